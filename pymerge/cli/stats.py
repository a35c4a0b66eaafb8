"""`pymerge stats`: collects statistics of a transformers model on a file of texts; merges and shows
statistics files.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from pymerge.cli.command import (
    PATH,
    Command,
    Group,
    device_named,
    echo,
    given_options,
    tell,
)
from pymerge.cli.options import WholeNumber
from pymerge.errors import OutputError, as_resource_errors
from pymerge.interrupt import load
from pymerge.messages.words import printable
from pymerge.rules import types
from pymerge.rules.mats import MAX_DIM

if TYPE_CHECKING:
    from pymerge.statistics import Progress, Statistics

    Advance = Callable[[Progress, int], None]

_KINDS: tuple[str, ...] = get_args(types.Kind)
_TASKS: tuple[str, ...] = get_args(types.Task)
_LABELS: tuple[str, ...] = get_args(types.Labels)
_LABELS_ARE = {
    "true": "labels drawn from the model (true)",
    "empirical": "labels of the data (empirical)",
    "exact": "all labels by their probability (exact)",
}
_LOSSES: dict[types.Task, str] = {
    "causal-lm": "the next token at every position, or of the targets where the lines have them",
    "masked-lm": "15 % of the tokens, hidden",
    "token-classification": "a class at every position",
    "sequence-classification": "a class for every text",
    "image-classification": "a class for every image",
    "seq2seq": "the tokens of the targets",
    "embedding": "the mean-pooled embedding, with unit variance",
}
_OF_MODELS: tuple[types.Kind, ...] = ("input_gram", "output_grad_gram")
_OF_VECTORS: tuple[types.Kind, ...] = ("block_fisher",)
_DTYPES = ("auto", "float32", "bfloat16", "float16")


class _Commands(Group):
    """Lets `pymerge stats MODEL DATA` stand for `pymerge stats collect MODEL DATA`."""

    command_class = Command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "-h", "--help"):
            args = ["collect", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
def stats() -> None:
    """Collect the statistics that MaTS, RegMean and Fisher merging need.

    \b
      pymerge stats MODEL DATA --out FILE    run MODEL over DATA (the same as `stats collect`)
      pymerge stats merge OUT PART...        add files: parts of the data or of the layers
      pymerge stats show FILE                what a file holds

    The options of the first are shown by: pymerge stats collect --help
    """


def _kinds(
    ctx: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[str, ...] | None:
    if value is None:
        return None
    kinds = tuple(kind.strip() for kind in value.split(","))
    for kind in kinds:
        if kind not in _KINDS:
            raise click.BadParameter(f"{kind!r} is not one of {', '.join(_KINDS)}")
    return kinds


def _bytes(ctx: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    from pymerge.checkpoint.layout import parse_size

    try:
        return None if value is None else parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


_overwrite = click.option(
    "--overwrite", is_flag=True, help="Replace the statistics file that has this name already."
)


@stats.command(also={"loss": "--task"})
@click.argument("model")
@click.argument("data", type=PATH)
@click.option("--out", type=PATH, required=True, help="The statistics file to write.")
@_overwrite
@click.option(
    "--kinds",
    callback=_kinds,
    help=(
        f"What to collect, separated by commas: {', '.join(_KINDS)}.  [default:"
        f" {','.join(_OF_MODELS)}; of an (IA)^3 adapter {','.join(_OF_VECTORS)}]"
    ),
)
@click.option(
    "--task",
    type=click.Choice(_TASKS),
    help="What the model is trained for.  [default: by its architecture]",
)
@click.option(
    "--labels",
    type=click.Choice(_LABELS),
    default="true",
    show_default=True,
    help=(
        "Labels of the gradients: true draws them from the model, empirical takes those of DATA,"
        " exact takes all of them by their probability."
    ),
)
@click.option(
    "--samples",
    type=WholeNumber(1),
    default=1,
    show_default=True,
    metavar="N",
    help="Labels drawn for each prediction, with --labels true.",
)
@click.option(
    "--layers",
    multiple=True,
    metavar="GLOB",
    help="Only the layers whose names match, such as 'model.layers.*'; may be given several times.",
)
@click.option(
    "--max-tokens",
    type=WholeNumber(1),
    metavar="N",
    help="Stop after the batch that reaches so many tokens.  [default: all of DATA]",
)
@click.option(
    "--batch-size",
    type=WholeNumber(1),
    default=8,
    show_default=True,
    metavar="N",
    help="Texts that the model reads at a time.",
)
@click.option(
    "--max-length",
    type=WholeNumber(1),
    default=512,
    show_default=True,
    metavar="N",
    help="Tokens of a text that are read; the rest is cut off.",
)
@click.option(
    "--memory-limit",
    metavar="SIZE",
    callback=_bytes,
    help=(
        "The most memory for the sums, in bytes or as 500MB or 8GB; more passes over DATA where"
        " they do not fit.  [default: half of the memory beside the model]"
    ),
)
@click.option(
    "--max-dim",
    type=WholeNumber(1),
    default=MAX_DIM,
    show_default=True,
    metavar="N",
    help="Leave out matrices of more rows, such as those of a vocabulary.",
)
@click.option(
    "--checkpoint-every",
    type=WholeNumber(1),
    metavar="N",
    help="Keep what there is after every N batches, for --resume.  [default: after every pass]",
)
@click.option("--resume", is_flag=True, help="Go on with an interrupted run into the same file.")
@click.option(
    "--device",
    metavar="DEVICE",
    callback=device_named,
    help="Where to compute: cpu, cuda or cuda:N.  [default: cuda where there is one, else cpu]",
)
@click.option(
    "--dtype",
    type=click.Choice(_DTYPES),
    default="auto",
    show_default=True,
    help="Dtype to load the model in; auto is the one it is stored in, and float32 on a CPU.",
)
@click.option(
    "--seed",
    type=WholeNumber(0, (1 << 63) - 1),
    default=0,
    show_default=True,
    metavar="N",
    help="Seed of the labels that are drawn and the words that are masked.",
)
@click.option(
    "--first-example",
    type=WholeNumber(0),
    default=0,
    metavar="N",
    show_default=True,
    help="Where DATA is a part of the data: how many texts come before it in the other parts.",
)
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
@click.pass_context
def collect(ctx: click.Context, /, model: str, data: Path, quiet: bool, **options: Any) -> None:
    """Run MODEL over the texts in DATA and write its statistics.

    MODEL is a transformers folder, an (IA)^3 adapter's, or a hub name. DATA is a .txt file with one
    text per line, or a .jsonl file with one {"text": ..., "label": ...} per line; {"input": ...,
    "target": ...} of sequence-to-sequence models and of language models that follow a prompt;
    {"image": "cat.png", "label": ...} of image classifiers.
    """
    load("pymerge.statistics")
    with suppress(ImportError):  # whose absence is told where it is needed
        load("transformers")
    from pymerge.backends import native

    if options["checkpoint_every"]:
        again = ["pymerge", "stats", model, str(data), "--resume", *given_options(ctx, "resume")]
        ctx.meta["pymerge.stats.again"] = shlex.join(again)
    with (
        native.surviving_lost_pages(any_mapping=True),
        _progress(quiet, options["max_tokens"]) as advance,
    ):
        say = None if quiet else tell
        found = collect_texts(model, data, progress=advance, say=say, **options)
    if not quiet:
        _show_new(found, options["out"])


def collect_texts(
    model: str,
    data: Path,
    *,
    out: Path,
    overwrite: bool = False,
    kinds: Sequence[types.Kind] | None = None,
    task: types.Task | None = None,
    labels: types.Labels = "true",
    samples: int = 1,
    layers: Sequence[str] = (),
    max_tokens: int | None = None,
    batch_size: int = 8,
    max_length: int = 512,
    memory_limit: int | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    device: str | None = None,
    dtype: str = "auto",
    seed: int = 0,
    first_example: int = 0,
    max_dim: int = MAX_DIM,
    progress: Advance | None = None,
    say: Callable[[str], None] | None = None,
) -> Statistics:
    """What `pymerge stats MODEL DATA` does; layers are named as in the model's files, of an (IA)^3
    adapter in its own. progress: told the number of texts too. say: told what the gradients are of.
    """
    from pymerge.checkpoint.files import exists
    from pymerge.engine.card import ShortNames
    from pymerge.statistics import collect as collect_from
    from pymerge.statistics._adapters import layers_of
    from pymerge.statistics._file import check_free
    from pymerge.statistics._images import ImageBatches
    from pymerge.statistics._models import load_model
    from pymerge.statistics._targets import name_filter
    from pymerge.statistics._text import TextBatches, label_numbers, read_examples

    if not exists(data):
        raise FileNotFoundError(f"there is no data file {data}")
    check_free(out, overwrite=overwrite)
    examples = read_examples(data)
    loaded = load_model(model, task, device, dtype)
    numbers = None
    if loaded.task == "token-classification" and labels == "empirical":
        raise ValueError(
            "--labels empirical needs a label per token, which a text file cannot give; use the"
            " Python API"
        )
    of_examples = loaded.task in ("sequence-classification", "image-classification")
    if of_examples and labels == "empirical":
        config = loaded.model.config
        numbers = label_numbers(examples, dict(config.label2id or {}), int(config.num_labels))
    shared: Any = {"batch_size": batch_size, "labels": numbers, "first": first_example}
    batches: TextBatches | ImageBatches
    if loaded.task == "image-classification":
        batches = ImageBatches(loaded.tokenizer, examples, data.parent, **shared)
    else:
        longest = min(max_length, loaded.max_length)
        batches = TextBatches(
            loaded.tokenizer,
            examples,
            max_length=longest,
            task=loaded.task,
            seed=seed,
            **shared,
        )
    if say is not None:
        say(f"task {loaded.task}, {loaded.why}: {_LOSSES[loaded.task]}")
    chosen: Any = list(layers) or None
    if loaded.adapter:
        own, asked = layers_of(loaded.adapter), name_filter("layers", chosen)

        def of_adapter(name: str) -> bool:
            return name in own and asked(name)

        chosen = of_adapter
    return collect_from(
        loaded.model,
        batches,
        loss=loaded.task,
        kinds=kinds or (_OF_VECTORS if loaded.adapter else _OF_MODELS),
        layers=chosen,
        labels=labels,
        samples=samples,
        seed=seed,
        max_tokens=max_tokens,
        memory_limit=memory_limit,
        max_dim=max_dim,
        rename=loaded.rename,
        out=out,
        overwrite=overwrite,
        checkpoint_every=checkpoint_every,
        resume=resume,
        model_name=ShortNames((model,)).of(model),
        progress=None if progress is None else lambda state: progress(state, len(examples)),
    )


@stats.command()
@click.argument("out", type=PATH)
@click.argument("parts", nargs=-1, required=True, type=PATH)
@click.option(
    "--allow-repeats", is_flag=True, help="Count the data that several of PARTS hold once for each."
)
@_overwrite
def merge(out: Path, parts: tuple[Path, ...], allow_repeats: bool, overwrite: bool) -> None:
    """Add the statistics files PARTS, and write the sum to the new file OUT."""
    from pymerge.statistics import merge_files

    _show_new(merge_files(parts, out, overwrite=overwrite, allow_repeats=allow_repeats), out)


@stats.command()
@click.argument("file", type=PATH)
@click.option("--tensors", is_flag=True, help="Show a line for every layer and parameter.")
def show(file: Path, tensors: bool) -> None:
    """Show what a statistics file holds; reads its header only."""
    from pymerge.messages.words import counted
    from pymerge.statistics import load

    found = load(file)
    echo(_summary(found))
    for key, counts in found.header["tensors"].items() if tensors else ():
        draws = f", {counted(counts['draws'], 'draw')}" if counts["draws"] else ""
        echo(printable(f"  {key}: {counted(counts['tokens'], 'token')}{draws}"))
    for key, own in found.header["aliases"].items() if tensors else ():
        echo(printable(f"  {key}: as {own}"))


def _show_new(found: Statistics, out: Path) -> None:
    try:
        echo(_summary(found))
    except OutputError as error:
        raise OutputError(f"{out} is complete, but {error}") from error


def _summary(found: Statistics) -> str:
    from pymerge.cli.terminal import amount
    from pymerge.messages.words import counted, some_names

    header, path = found.header, found.path
    assert path is not None
    examples, tokens = (
        sum(part[unit] for part in header["data"]) for unit in ("examples", "tokens")
    )
    kinds = sorted({key.partition("/")[0] for key in header["tensors"]}, key=_KINDS.index)
    held = {"layer": len(found.layers), "parameter": len(found.parameters)}
    of = " and ".join(counted(number, noun) for noun, number in held.items() if number)
    labels = header["settings"]["labels"]
    lines = [
        f"{path}: {amount(path.stat().st_size)}, {', '.join(kinds) or 'nothing'}",
        f"  of {header['model']['name'] or header['model']['class']}: {of or 'no layers'}",
        f"  over {counted(examples, 'example')}, {counted(tokens, 'token')}"
        + (f"; {_LABELS_ARE[labels]}" if labels in _LABELS_ARE else ""),
    ]
    reasons: dict[str, list[str]] = {}
    for key, why in header["skipped"].items():
        reasons.setdefault(why, []).append(key)
    lines += [f"  left out: {some_names(keys)}: {why}" for why, keys in reasons.items()]
    return printable("\n".join(lines))


@contextmanager
def _progress(quiet: bool, max_tokens: int | None) -> Iterator[Advance | None]:
    """A status line on a terminal, an occasional line elsewhere; both with the time left."""
    from pymerge.cli.terminal import PLAIN_EVERY, Screen

    console = Screen(stderr=True)
    began = time.monotonic()
    first: tuple[float, float] | None = (
        None  # when the first batch was done, and the share of the work by then
    )

    def line_of(state: Progress, total: int) -> str:
        nonlocal first
        share = max(state.examples / total, state.tokens / max_tokens if max_tokens else 0)
        share = (state.number + min(share, 1)) / state.passes
        now = time.monotonic()
        first = first or (now, share)
        return _line(state, total, max_tokens, now - first[0], share - first[1], 1 - share)

    if quiet:
        yield None
    elif console.is_terminal:
        with console.status("loading the model") as status:
            yield lambda state, total: status.update(line_of(state, total))
    else:

        def advance(state: Progress, total: int) -> None:
            nonlocal began
            line = line_of(state, total)
            if time.monotonic() - began >= PLAIN_EVERY:
                began = time.monotonic()
                tell(line)

        yield advance


def _line(
    state: Progress, total: int, max_tokens: int | None, seconds: float, done: float, left: float
) -> str:
    from pymerge.cli.terminal import duration

    passes = f"pass {state.number + 1} of {state.passes}, " if state.passes > 1 else ""
    limit = f" of {max_tokens:,}" if max_tokens else ""
    of = f"{total:,} example{'s' * (total != 1)}"
    line = f"{passes}{state.examples:,} of {of}, {state.tokens:,}{limit} tokens"
    return f"{line}, {duration(seconds * left / done)} left" if done > 0 and left > 0 else line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status: 0 done, 1 impossible, 2 wrong usage, 130
    interrupted.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with stats.make_context(
            "pymerge stats", list(sys.argv[1:] if arguments is None else arguments)
        ) as context:
            try:
                with as_resource_errors():
                    stats.invoke(context)
            except KeyboardInterrupt:
                again = context.meta.get("pymerge.stats.again")
                hint = f". To go on from the last checkpoint: {again}" if again else ""
                click.echo(f"\ninterrupted{hint}", err=True)
                return 130
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (ValueError, RuntimeError, FloatingPointError) as error:
        tell(f"error: {error}")
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.strerror and error.filename else ""
        tell(f"error: {where}{error.strerror or error}")
        return 1
    return 0
