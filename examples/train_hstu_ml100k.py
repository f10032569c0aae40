"""Trains the example model: `research` HSTU on MovieLens-100K, on a CPU in minutes.

    python -m examples.train_hstu_ml100k

Each user's last event is the test target and the second last the validation target; neither is
trained on. Histories longer than the model reads are cut into windows, so that every training
event is predicted. The weights kept are an exponential moving average over steps, taken at the
epoch with the best validation NDCG@10. Test figures are computed once, from the saved files.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.report import write_result
from examples.hstu_training import (
    Metrics,
    evaluate,
    initialise,
    load_whole,
    pad_histories,
    padded_forward,
)
from helm_engine.datasets.ml100k import Int64Array, MovieLens100K, load_ml100k
from model_executor.checkpoint import save_model
from model_executor.model_config import ITEM_TABLE, ResearchConfig
from model_executor.models.research import ResearchHSTU

DEFAULT_OUTPUT = Path("examples/models/hstu-ml-100k")
DEFAULT_RESULT = Path("benchmarks/results/train_hstu_ml100k.json")
HELD_OUT_EVENTS = 2
EPOCHS_PER_EVALUATION = 5


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of the training; those of the model are in `model_config`."""

    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0
    batch_size: int = 32
    """Windows per step."""
    dropout: float = 0.35
    """Of 0.2, 0.35 and 0.5 the one with the best validation NDCG@10."""
    temperature: float = 0.05
    """Divides the cosine similarities before the softmax over all items."""
    average_decay: float = 0.99
    """Of the moving average of weights, per step."""


def model_config(num_items: int) -> ResearchConfig:
    """The shape of the reference's MovieLens configuration."""
    return ResearchConfig(
        model_type="hstu",
        dialect="research",
        dtype="float32",
        num_items=num_items,
        embedding_dim=50,
        num_layers=2,
        num_heads=1,
        dqk=50,
        dv=50,
        max_sequence_len=200,
        max_output_len=11,
        num_time_buckets=128,
        layer_norm_eps=1e-6,
        l2_norm_eps=1e-6,
    )


@dataclass(frozen=True, slots=True)
class Window:
    """Consecutive events of a user: all but the last are read, all but the first predicted."""

    item_ids: Int64Array
    timestamps: Int64Array


class Trainee(nn.Module):
    """Everything that is trained: the dense weights and the item table."""

    def __init__(self, config: ResearchConfig, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.model = ResearchHSTU(config)
        self.item_table = nn.Parameter(initialise(self.model))

    def forward(self, windows: list[Window]) -> Tensor:
        """Mean cross-entropy of predicting each window's events among all items."""
        batch = pad_histories(
            [window.item_ids[:-1] for window in windows],
            [window.timestamps[:-1] for window in windows],
            [int(window.timestamps[-1]) for window in windows],
        )
        rows = functional.embedding(batch.item_ids, self.item_table, padding_idx=0)
        outputs = padded_forward(
            self.model, rows, batch.timestamps, batch.lengths, self.recipe.dropout
        )
        targets = torch.from_numpy(np.concatenate([window.item_ids[1:] for window in windows]))
        # Row-major selection puts the rows in the order of the concatenated targets.
        predicting = outputs[batch.item_ids > 0]
        items = self.model.normalise_item(self.item_table[1:])
        return functional.cross_entropy(predicting @ items.T / self.recipe.temperature, targets - 1)


def training_windows(dataset: MovieLens100K, max_sequence_len: int) -> list[Window]:
    """Cuts each user's training events from the newest back; windows share one event."""
    windows = []
    for user_index in range(dataset.num_users):
        items, times = dataset.history(user_index)
        end = len(items) - HELD_OUT_EVENTS
        while end > 1:
            start = max(0, end - max_sequence_len - 1)
            windows.append(Window(items[start:end], times[start:end]))
            # The oldest event of this window is only read in it: the next one predicts it.
            end = start + 1
    return windows


def batches(
    windows: list[Window], batch_size: int, random: np.random.Generator
) -> Iterator[list[Window]]:
    """Shuffled batches of windows of like length, so that little is padding."""
    lengths = np.array([len(window.item_ids) for window in windows], dtype=np.float64)
    # The jitter changes which windows meet in a batch from epoch to epoch.
    order = np.argsort(lengths * np.exp(random.uniform(-0.1, 0.1, len(windows))))
    starts = np.arange(0, len(windows), batch_size)
    random.shuffle(starts)
    for start in starts:
        yield [windows[index] for index in order[start : start + batch_size]]


@dataclass(frozen=True, slots=True)
class Trained:
    """Outcome of a training run."""

    model: ResearchHSTU
    item_table: Tensor
    epoch: int
    """The selected one, from 1."""
    curve: list[dict[str, float]]
    """Validation figures of each evaluated epoch, seen items removed."""
    seconds_per_epoch: float
    """Median, without evaluation."""


def train(dataset: MovieLens100K, recipe: Recipe, epochs: int, seed: int) -> Trained:
    """Trains and returns the averaged weights of the epoch with the best validation NDCG@10."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    config = model_config(dataset.num_items)
    trainee = Trainee(config, recipe)
    average = AveragedModel(trainee, multi_avg_fn=get_ema_multi_avg_fn(recipe.average_decay))
    optimiser = torch.optim.AdamW(
        trainee.parameters(),
        lr=recipe.learning_rate,
        betas=recipe.betas,
        weight_decay=recipe.weight_decay,
    )
    windows = training_windows(dataset, config.max_sequence_len)
    best, best_epoch, best_ndcg10 = trainee, 0, -1.0
    curve: list[dict[str, float]] = []
    epoch_seconds = []
    for epoch in range(1, epochs + 1):
        started = time.perf_counter()
        losses = []
        for batch in batches(windows, recipe.batch_size, random):
            loss = trainee(batch)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            average.update_parameters(trainee)
            losses.append(loss.item())
        epoch_seconds.append(time.perf_counter() - started)
        line = f"epoch {epoch:3d}  loss {np.mean(losses):.4f}  {epoch_seconds[-1]:.1f} s"
        if epoch % EPOCHS_PER_EVALUATION == 0 or epoch == epochs:
            averaged = average.module
            assert isinstance(averaged, Trainee)
            found = evaluate(averaged.model, averaged.item_table.detach(), dataset, "validation")
            curve.append({"epoch": epoch, **rounded(found)})
            line += f"  validation HR@10 {found.hr10:.4f}  NDCG@10 {found.ndcg10:.4f}"
            if found.ndcg10 > best_ndcg10:
                best, best_epoch, best_ndcg10 = deepcopy(averaged), epoch, found.ndcg10
        print(line, flush=True)
    return Trained(best.model, best.item_table, best_epoch, curve, float(np.median(epoch_seconds)))


def rounded(metrics: Metrics) -> dict[str, float]:
    """Metrics as they are reported."""
    return {name: round(value, 6) for name, value in asdict(metrics).items()}


def figures_of_saved_model(directory: Path, dataset: MovieLens100K) -> dict[str, Any]:
    """Validation and test figures of a model directory, with seen items removed and kept."""
    model, item_table = load_whole(directory)
    figures: dict[str, Any] = {}
    for split in ("validation", "test"):
        figures[split] = {
            convention: rounded(
                evaluate(model, item_table, dataset, split, remove_seen=convention == "removed")
            )
            for convention in ("removed", "kept")
        }
    return figures


def parse_arguments() -> argparse.Namespace:
    """Command line; defaults are the ones the published example was trained with."""
    parser = argparse.ArgumentParser(description="Train HSTU on MovieLens-100K.")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="model directory")
    parser.add_argument("--result", type=Path, default=DEFAULT_RESULT, help="JSON of the figures")
    parser.add_argument("--data", type=Path, help="a copy of the data (default: download it)")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--dropout", type=float, default=Recipe.dropout)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    arguments = parser.parse_args()
    if arguments.epochs < 1 or arguments.threads < 1:
        parser.error("--epochs and --threads must be at least 1")
    return arguments


def main() -> None:
    """Trains, saves, evaluates what was saved, and writes the figures."""
    arguments = parse_arguments()
    started = time.perf_counter()
    torch.set_num_threads(arguments.threads)
    dataset = load_ml100k(arguments.data)
    recipe = Recipe(dropout=arguments.dropout)
    trained = train(dataset, recipe, arguments.epochs, arguments.seed)
    save_model(arguments.output, trained.model, {ITEM_TABLE: trained.item_table})
    figures = {
        "data": f"MovieLens-100K: {dataset.num_events} events, {dataset.num_users} users, "
        f"{dataset.num_items} items; last event held out for test, second last for validation",
        "conventions": "all items ranked; 'removed': items of the whole history left out of the "
        "ranking, 'kept': nothing left out; rank = 1 + items with a strictly higher score",
        "recipe": asdict(recipe),
        "epochs": arguments.epochs,
        "torch_threads": arguments.threads,
        "selected_epoch": trained.epoch,
        "selected_by": "validation NDCG@10, seen items removed",
        **figures_of_saved_model(arguments.output, dataset),
        "validation_curve": trained.curve,
        "parameters": trained.item_table.numel()
        + sum(parameter.numel() for parameter in trained.model.parameters()),
        "seconds_per_epoch": round(trained.seconds_per_epoch, 2),
        "wall_seconds": round(time.perf_counter() - started, 1),
    }
    command = (
        "python -m examples.train_hstu_ml100k"
        f" --epochs {arguments.epochs} --dropout {arguments.dropout}"
        f" --seed {arguments.seed} --threads {arguments.threads}"
    )
    write_result(arguments.result, figures, [arguments.seed], command)
    print(json.dumps({split: figures[split] for split in ("validation", "test")}, indent=2))


if __name__ == "__main__":
    main()
