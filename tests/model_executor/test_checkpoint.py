"""Model directories: what is written is read back, and every damage is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_executor.checkpoint import (
    CONFIG_FILE,
    DENSE_FILE,
    TABLES_FILE,
    load_config,
    load_dense_weights,
    map_tables,
    model_version,
    save_model,
)
from model_executor.exceptions import ModelDirectoryError
from model_executor.model_config import ITEM_TABLE
from model_executor.models.registry import build_model
from tests.toy_models import TOY_CONFIG, TOY_CONFIGS, random_tables, toy_config, write_toy_model

CPU = torch.device("cpu")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_toy_model(tmp_path / "toy", toy_config())


def refusal(load: Callable[[], object]) -> str:
    with pytest.raises(ModelDirectoryError) as error:
        load()
    return str(error.value)


# ---------------------------------------------------------------- round trip


@pytest.mark.parametrize("dialect", TOY_CONFIGS)
def test_saved_config_is_read_back(tmp_path: Path, dialect: str) -> None:
    directory = write_toy_model(tmp_path / "toy", toy_config(dialect))
    assert load_config(directory) == toy_config(dialect)


@pytest.mark.parametrize("dialect", TOY_CONFIGS)
def test_saved_weights_are_read_back(tmp_path: Path, dialect: str) -> None:
    model = build_model(toy_config(dialect))
    for number, parameter in enumerate(model.parameters()):
        torch.nn.init.constant_(parameter, number)
    save_model(tmp_path, model, random_tables(model.config))
    loaded = load_dense_weights(tmp_path, load_config(tmp_path), CPU)
    for (name, before), (_, after) in zip(
        model.named_parameters(), loaded.named_parameters(), strict=True
    ):
        assert torch.equal(before, after), name


@pytest.mark.parametrize("dialect", TOY_CONFIGS)
def test_loaded_weights_take_no_gradients_and_all_of_them_are_there(
    tmp_path: Path, dialect: str
) -> None:
    directory = write_toy_model(tmp_path / "toy", toy_config(dialect))
    model = load_dense_weights(directory, toy_config(dialect), CPU)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    # A tensor left on the meta device, such as a constant that is in no file, cannot be read.
    assert all(torch.isfinite(tensor).all() for tensor in (*model.parameters(), *model.buffers()))


def test_saved_table_is_read_back(tmp_path: Path) -> None:
    table = torch.arange(61 * 12, dtype=torch.float32).view(61, 12)
    save_model(tmp_path, build_model(toy_config()), {ITEM_TABLE: table})
    (mapped,) = map_tables(tmp_path, toy_config())
    assert np.array_equal(mapped, table.numpy())


def test_each_of_several_tables_is_found_in_their_file_in_the_order_of_the_config(
    tmp_path: Path,
) -> None:
    contextual = [{"name": name, "num_rows": 4097 + n} for n, name in enumerate(("zeta", "alpha"))]
    config = toy_config("stu", contextual=contextual)
    tables = random_tables(config)
    save_model(tmp_path, build_model(config), dict(reversed(tables.items())))
    mapped = map_tables(tmp_path, config)
    names = [ITEM_TABLE, "contextual.zeta", "contextual.alpha"]
    for name, table in zip(names, mapped, strict=True):
        assert np.array_equal(table, tables[name].numpy())


def test_table_is_mapped_and_cannot_be_written(directory: Path) -> None:
    (table,) = map_tables(directory, toy_config())
    assert isinstance(table, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        table[0, 0] = 1.0


@pytest.mark.parametrize("name", [CONFIG_FILE, DENSE_FILE, TABLES_FILE])
def test_version_changes_with_any_byte_of_any_file(directory: Path, name: str) -> None:
    before = model_version(directory)
    content = bytearray((directory / name).read_bytes())
    content[-1] ^= 1
    (directory / name).write_bytes(content)
    assert model_version(directory) != before


def test_copies_of_a_model_have_the_same_version(tmp_path: Path) -> None:
    first, second = (write_toy_model(tmp_path / name, toy_config()) for name in ("a", "b"))
    assert model_version(first) == model_version(second)


@pytest.mark.parametrize(
    "tables",
    [
        {},
        {ITEM_TABLE: torch.zeros(60, 12)},
        {ITEM_TABLE: torch.zeros(61, 13)},
        {ITEM_TABLE: torch.zeros(61, 12, dtype=torch.float64)},
        {ITEM_TABLE: torch.zeros(61, 12), "contextual.age": torch.zeros(5, 12)},
    ],
    ids=["missing", "too few rows", "too wide", "float64", "too many"],
)
def test_tables_that_are_not_the_configs_are_not_written(
    tmp_path: Path, tables: dict[str, Tensor]
) -> None:
    with pytest.raises(ValueError, match=r"^tables: .*\(61, 12\)"):
        save_model(tmp_path / "new", build_model(toy_config()), tables)
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------- config.json


def write_config(directory: Path, content: str) -> None:
    (directory / CONFIG_FILE).write_text(content, encoding="utf-8")


WRONG_VALUES: dict[str, list[Any]] = {
    "model_type": ["bert", 1, None],
    "dialect": ["fuxi", "Research", 1, None, ["research"]],
    "dtype": ["float16", 32],
    "num_items": [0, -1, 2**31 - 1, 60.0, "60", True, None],
    "embedding_dim": [0, 65_537, 12.0, "12", [12]],
    "num_layers": [0, 257, 3.0, "3"],
    "num_heads": [0, 257, 2.0, "2"],
    "dqk": [0, 65_537, 4.0, "4"],
    "dv": [0, 65_537, 6.0, "6"],
    "max_sequence_len": [0, 1_048_577, 24.0, "24"],
    "max_output_len": [-1, 65_537, 3.0, "3"],
    "num_time_buckets": [0, 1_025, 64.0, "64"],
    "layer_norm_eps": [0.0, -1e-6, 0.02, float("nan"), float("inf"), "1e-6", None],
    "l2_norm_eps": [0.0, -1e-6, 0.02, float("nan"), float("inf"), "1e-6", None],
}


def test_wrong_values_are_tried_for_every_field() -> None:
    assert WRONG_VALUES.keys() == TOY_CONFIG.keys()


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in WRONG_VALUES.items() for value in values],
)
def test_wrong_value_is_refused_by_file_and_field(
    directory: Path, field: str, value: object
) -> None:
    write_config(directory, json.dumps({**TOY_CONFIG, field: value}))
    message = refusal(lambda: load_config(directory))
    assert message.startswith(f"{directory / CONFIG_FILE}: {field}: ")


@pytest.mark.parametrize("field", TOY_CONFIG)
def test_missing_field_is_refused_by_file_and_field(directory: Path, field: str) -> None:
    rest = {name: value for name, value in TOY_CONFIG.items() if name != field}
    write_config(directory, json.dumps(rest))
    message = refusal(lambda: load_config(directory))
    assert message.startswith(f"{directory / CONFIG_FILE}: {field}: ")


def test_unknown_key_is_refused_by_name(directory: Path) -> None:
    write_config(directory, json.dumps({**TOY_CONFIG, "num_head": 2}))
    message = refusal(lambda: load_config(directory))
    assert message.startswith(f"{directory / CONFIG_FILE}: num_head: ")


def test_unsupported_dialect_is_named_with_the_supported_ones(directory: Path) -> None:
    write_config(directory, json.dumps({**TOY_CONFIG, "dialect": "fuxi"}))
    message = refusal(lambda: load_config(directory))
    assert "'fuxi' is not supported (supported: research, stu, nvidia, sasrec)" in message


def test_unsupported_dialect_is_named_even_if_its_other_keys_are_unknown(directory: Path) -> None:
    write_config(directory, json.dumps({"dialect": "fuxi", "some_key_of_fuxi": 1}))
    assert "'fuxi' is not supported" in refusal(lambda: load_config(directory))


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"hstu"'])
def test_config_that_is_no_json_object_is_refused_by_file(directory: Path, content: str) -> None:
    write_config(directory, content)
    assert str(directory / CONFIG_FILE) in refusal(lambda: load_config(directory))


def test_config_nested_beyond_what_json_can_read_is_refused_by_file(directory: Path) -> None:
    write_config(directory, "[" * 100_000)
    assert str(directory / CONFIG_FILE) in refusal(lambda: load_config(directory))


def test_config_that_is_no_text_is_refused_by_file(directory: Path) -> None:
    (directory / CONFIG_FILE).write_bytes(b"\xff\xfe\x00")
    assert str(directory / CONFIG_FILE) in refusal(lambda: load_config(directory))


# ---------------------------------------------------------------- missing and cut files

LOADERS: dict[str, Callable[[Path], object]] = {
    CONFIG_FILE: load_config,
    DENSE_FILE: lambda directory: load_dense_weights(directory, toy_config(), CPU),
    TABLES_FILE: lambda directory: map_tables(directory, toy_config()),
}


def test_path_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    assert "nowhere: is not a directory" in refusal(lambda: load_config(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", LOADERS)
def test_missing_file_is_refused_by_name(directory: Path, name: str) -> None:
    (directory / name).unlink()
    assert str(directory / name) in refusal(lambda: LOADERS[name](directory))


@pytest.mark.parametrize("name", LOADERS)
def test_directory_in_place_of_a_file_is_refused_by_name(directory: Path, name: str) -> None:
    (directory / name).unlink()
    (directory / name).mkdir()
    assert str(directory / name) in refusal(lambda: LOADERS[name](directory))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.5, 0.999])
@pytest.mark.parametrize("name", [DENSE_FILE, TABLES_FILE])
def test_cut_file_is_refused_by_name(directory: Path, name: str, share: float) -> None:
    content = (directory / name).read_bytes()
    (directory / name).write_bytes(content[: int(share * len(content))])
    assert str(directory / name) in refusal(lambda: LOADERS[name](directory))


# ---------------------------------------------------------------- tensors

BIAS = "layers.1.output.bias"


def change_dense(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> str:
    tensors = load_file(directory / DENSE_FILE)
    change(tensors)
    save_file(tensors, directory / DENSE_FILE)
    message = refusal(lambda: load_dense_weights(directory, toy_config(), CPU))
    assert message.startswith(f"{directory / DENSE_FILE}: tensor ")
    return message


def test_missing_tensor_is_refused_by_name(directory: Path) -> None:
    message = change_dense(directory, lambda tensors: tensors.pop(BIAS))
    assert f"'{BIAS}' is missing" in message


def test_tensor_too_many_is_refused_by_name(directory: Path) -> None:
    message = change_dense(directory, lambda tensors: tensors.update(extra=torch.ones(1)))
    assert "'extra' does not belong" in message


def test_tensor_of_wrong_shape_is_refused_with_both_shapes(directory: Path) -> None:
    message = change_dense(directory, lambda tensors: tensors.update({BIAS: torch.ones(1, 12)}))
    assert f"'{BIAS}' has shape [1, 12]" in message
    assert "[12]" in message.replace("[1, 12]", "")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_tensor_of_wrong_dtype_is_refused_by_name(directory: Path, dtype: torch.dtype) -> None:
    message = change_dense(
        directory, lambda tensors: tensors.update({BIAS: torch.ones(12, dtype=dtype)})
    )
    assert f"'{BIAS}' is {dtype}" in message


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weight_that_is_not_finite_is_refused_by_name(directory: Path, value: float) -> None:
    message = change_dense(directory, lambda tensors: tensors[BIAS][3:4].fill_(value))
    assert f"'{BIAS}' holds values that are not finite" in message


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        ({}, "is missing"),
        ({ITEM_TABLE: torch.ones(60, 12)}, "F32 [60, 12]"),
        ({ITEM_TABLE: torch.ones(61, 13)}, "F32 [61, 13]"),
        ({ITEM_TABLE: torch.ones(61 * 12)}, "F32 [732]"),
        ({ITEM_TABLE: torch.ones(61, 12, dtype=torch.float64)}, "F64 [61, 12]"),
        ({ITEM_TABLE: torch.ones(61, 12, dtype=torch.int32)}, "I32 [61, 12]"),
    ],
    ids=["missing", "too few rows", "too wide", "flat", "float64", "int32"],
)
def test_table_of_wrong_kind_is_refused_by_name(
    directory: Path, tensors: dict[str, Tensor], found: str
) -> None:
    save_file(tensors, directory / TABLES_FILE)
    message = refusal(lambda: map_tables(directory, toy_config()))
    assert message.startswith(f"{directory / TABLES_FILE}: tensor '{ITEM_TABLE}' ")
    assert found in message


def test_table_that_the_model_does_not_have_is_refused_by_name(directory: Path) -> None:
    tensors = load_file(directory / TABLES_FILE)
    save_file({**tensors, "contextual.age": torch.ones(5, 12)}, directory / TABLES_FILE)
    message = refusal(lambda: map_tables(directory, toy_config()))
    assert f"{TABLES_FILE}: tensor 'contextual.age' does not belong" in message


def test_one_of_several_tables_that_is_missing_is_refused_by_name(tmp_path: Path) -> None:
    directory = write_toy_model(tmp_path / "toy", toy_config("stu"))
    tensors = load_file(directory / TABLES_FILE)
    save_file({ITEM_TABLE: tensors[ITEM_TABLE]}, directory / TABLES_FILE)
    message = refusal(lambda: map_tables(directory, toy_config("stu")))
    assert f"{TABLES_FILE}: tensor 'contextual.user_id' is missing" in message


def test_file_that_names_its_origin_in_metadata_is_accepted(directory: Path) -> None:
    tensors = load_file(directory / TABLES_FILE)
    save_file(tensors, directory / TABLES_FILE, metadata={"format": "pt"})
    (table,) = map_tables(directory, toy_config())
    assert np.array_equal(table, tensors[ITEM_TABLE].numpy())
