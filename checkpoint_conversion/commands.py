"""The command line of the conversions: `igpo convert ...`, or `python -m checkpoint_conversion.commands ...`.

Torch is imported when a conversion begins, so that --help is quick.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from checkpoint_conversion import MAX_SHARD_BYTES, ConversionError

app = typer.Typer(help="Convert checkpoints between Hugging Face and Megatron-Core, and GGUF files to Hugging Face.", no_args_is_help=True)
HfOption = Annotated[Path, typer.Option("--hf", help="Hugging Face folder with config.json and safetensors.")]
MegatronOption = Annotated[
    Path, typer.Option("--megatron", help="Checkpoint folder with model/ and hf/ in it, or one that Megatron itself wrote.")
]
OutOption = Annotated[
    Path, typer.Option("--out", help="Folder to create; must not exist. The same command resumes one that was interrupted.")
]
NewOption = Annotated[Path, typer.Option("--out", help="Hugging Face folder to create; must not exist.")]
GgufDtypeOption = Annotated[str, typer.Option("--dtype", help="float32 or bfloat16: what the quantised weights become.")]
ShardOption = Annotated[float, typer.Option("--max-shard-gb", help="Largest file; a larger tensor has a file of its own.")]


@contextmanager
def _one_sentence_errors() -> Iterator[None]:
    """Print mistakes of the user and errors of the disk as one sentence; our own mistakes stay tracebacks.

    The exit code is 2 for mistakes of the user, 1 for errors of the disk, and 128 + N for signal N, which a KeyboardInterrupt may name.
    """
    try:
        yield
    except BrokenPipeError:
        raise  # the reader of the output has closed it
    except (ConversionError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, ConversionError) else 1) from error
    except KeyboardInterrupt as error:
        typer.echo("interrupted; what is finished is kept, and the same command resumes", err=True)
        raise typer.Exit(128 + signal.Signals.__members__.get(str(error), signal.SIGINT)) from error


@app.command("hf-to-megatron", epilog="Example: igpo convert hf-to-megatron --hf models/qwen --out models/qwen-mcore")
def hf_to_megatron_command(
    hf: HfOption,
    out: OutOption,
    layout: Annotated[str, typer.Option(help="torch_dist loads at any parallel layout; classic has one file per rank.")] = "torch_dist",
    tensor: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks of the classic layout.")] = 1,
    pipeline: Annotated[int, typer.Option(min=1, help="Pipeline stages of the classic layout.")] = 1,
    expert: Annotated[int, typer.Option(min=1, help="Expert-parallel ranks of the classic layout.")] = 1,
    local_layers: Annotated[bool, typer.Option("--local-layers", help="Names of Megatron's local layers in the classic layout.")] = False,
    max_shard_gb: ShardOption = MAX_SHARD_BYTES / 1e9,
) -> None:
    """Convert a Hugging Face folder to a Megatron checkpoint."""
    from checkpoint_conversion.classic_folder import Grid
    from checkpoint_conversion.convert import hf_to_megatron

    with _one_sentence_errors():
        grid = Grid(tensor, pipeline, expert)
        if layout not in ("torch_dist", "classic"):
            raise ConversionError(f"--layout {layout} is not known; use torch_dist or classic")
        if layout == "torch_dist" and (grid != Grid() or local_layers):
            raise ConversionError("a torch_dist checkpoint loads at any parallel layout: leave the sizes out, or add --layout classic")
        classic = grid if layout == "classic" else None
        hf_to_megatron(hf, out, max_shard_bytes=int(max_shard_gb * 1e9), classic=classic, te_names=not local_layers)
    typer.echo(f"wrote {out}")


@app.command("megatron-to-hf", epilog="Example: igpo convert megatron-to-hf --megatron runs/a/step_40 --out hf")
def megatron_to_hf_command(
    megatron: MegatronOption,
    out: OutOption,
    dtype: Annotated[str | None, typer.Option(help="One of float32, bfloat16, float16; as stored if left out.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="Hugging Face folder with config.json and tokenizer, for a checkpoint that has none.")
    ] = None,
    max_shard_gb: ShardOption = MAX_SHARD_BYTES / 1e9,
) -> None:
    """Convert a Megatron checkpoint to a Hugging Face folder that transformers and vLLM load."""
    from checkpoint_conversion.convert import DTYPES, megatron_to_hf

    with _one_sentence_errors():
        if dtype is not None and dtype not in DTYPES:
            raise ConversionError(f"--dtype {dtype} is not known; use one of {', '.join(DTYPES)}")
        target = None if dtype is None else DTYPES[dtype]
        megatron_to_hf(megatron, out, target, config=config, max_shard_bytes=int(max_shard_gb * 1e9))
    typer.echo(f"wrote {out}")


@app.command("gguf-to-hf", epilog="Example: igpo convert gguf-to-hf --gguf model.Q4_1.gguf --out models/my")
def gguf_to_hf_command(
    gguf: Annotated[Path, typer.Option("--gguf", help="A .gguf file of a Llama, Qwen 2 or 3, or Gemma 2 or 3 model.")],
    out: NewOption,
    dtype: GgufDtypeOption = "float32",
) -> None:
    """Convert a GGUF file to a Hugging Face folder: weights dequantised, tokenizer and chat template compared with the file."""
    _write_gguf(lambda: gguf, out, dtype)


def demo_model(out: NewOption, dtype: GgufDtypeOption = "float32") -> None:
    """Make the Hugging Face folder of SmolLM2-135M-Instruct from the package that the extra `llm` installs."""
    from checkpoint_conversion.gguf_to_hf import demo_gguf

    _write_gguf(demo_gguf, out, dtype)


def _write_gguf(find: Callable[[], Path], out: Path, dtype: str) -> None:
    from checkpoint_conversion.gguf_to_hf import DTYPES, gguf_to_hf

    with _one_sentence_errors():
        if dtype not in DTYPES:
            raise ConversionError(f"--dtype {dtype} is not known; use one of {', '.join(DTYPES)}")
        gguf = find()
        typer.echo(f"reading {gguf.name}: weights are dequantised to {dtype} and compared")
        notes = gguf_to_hf(gguf, out, dtype)
    typer.echo("\n".join([f"wrote {out}", *notes]))


@app.command("verify", epilog="Example: igpo convert verify --hf models/qwen --megatron models/qwen-mcore")
def verify_command(hf: HfOption, megatron: MegatronOption) -> None:
    """Compare a Hugging Face folder with a Megatron checkpoint: names, shapes, dtypes, checksums; fails unless bit-equal."""
    if not report_verification(hf, megatron):
        raise typer.Exit(1)


def report_verification(hf: Path, megatron: Path) -> bool:
    """Print what `verify` finds; whether the two are bit-equal."""
    from checkpoint_conversion.convert import verify

    with _one_sentence_errors():
        result = verify(hf, megatron)
    typer.echo(
        f"{result.num_tensors} tensors, {len(result.differences)} differ; worst {result.worst} (difference {result.worst_difference:g})"
    )
    typer.echo(f"sha256 hf {result.hf_sha256}\nsha256 megatron {result.megatron_sha256}")
    for name, difference in result.differences.items():
        typer.echo(f"  {name}: {difference}")
    return not result.differences


@app.command("inspect", epilog="Example: igpo convert inspect models/qwen-mcore")
def inspect_command(
    folder: Annotated[Path, typer.Argument(help="Any folder: Hugging Face, Megatron, or an unfinished conversion; or a .gguf file.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
) -> None:
    """Describe a folder, or a GGUF file, and its contents."""
    from checkpoint_conversion.inspection import inspect

    with _one_sentence_errors():
        for line in inspect(folder, list_tensors=tensors):
            typer.echo(line)


if __name__ == "__main__":
    app()
