"""`megalith generate`: text from a checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megalith.cli.groups import grouped
from megalith.cli.options import (
    BatchSize,
    Checkpoint,
    ConfigFile,
    Device,
    PrecisionName,
    TokenizerPath,
)
from megalith.cli.reading import Keys, begin, load, progress, reading

if TYPE_CHECKING:
    from megalith.generate.jobs import Answer, Options
    from megalith.generate.loading import Loaded
    from megalith.generate.sampling import Sampling


@dataclass(frozen=True)
class Wanted:
    """What is to be answered, and where to."""

    prompt: Annotated[
        str | None, typer.Option(help="text to continue, or with <mask> where something is missing")
    ] = None
    prompt_tag: Annotated[
        str | None, typer.Option(help="the prompt of --prompts that stands before --prompt, or what is typed")
    ] = None
    input_file: Annotated[
        str | None,
        typer.Option(
            "--input-file",
            "--sample-input-file",
            help="prompts, one a line; .jsonl: strings, or objects with a prompt, or with a prompt_tag and a text; - is stdin",
        ),
    ] = None
    output_file: Annotated[
        str | None,
        typer.Option(
            "--output-file",
            "--sample-output-file",
            help="one JSON object a prompt, in order; - (default for --input-file) is stdout",
        ),
    ] = None
    num_samples: Annotated[
        int,
        typer.Option(
            min=0,
            help="so many unconditional texts, all different; with --prompt, of that prompt; with --beams, the best",
        ),
    ] = 0
    genfile: Annotated[
        str | None,
        typer.Option(help="JSON lines of the unconditional texts: text, length, finished; default: stdout"),
    ] = None
    interactive: Annotated[
        bool, typer.Option("--interactive", help="ask for prompts; Ctrl-C ends a text, Ctrl-D leaves")
    ] = False

    @property
    def streams(self) -> bool:
        """Is an answer shown while it is made?"""
        return self.interactive or (self.prompt is not None and self.output_file is None)


@dataclass(frozen=True)
class Choosing:
    """Which token comes next."""

    tokens_to_generate: Annotated[
        int, typer.Option("--tokens-to-generate", "--out-seq-length", help="at most")
    ] = 64
    min_tokens_to_generate: Annotated[int, typer.Option(help="no end of document before")] = 0
    temperature: Annotated[
        float | None, typer.Option(help="below 1 sharper, above 1 flatter; 0 is greedy")
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", "--top_k", help="draw from the k most probable tokens; a BERT shows so many"),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", "--top_p", help="draw from the smallest set with this probability"),
    ] = None
    repetition_penalty: Annotated[float, typer.Option(help="above 1 discourages tokens already there")] = 1.0
    no_repeat_ngram: Annotated[
        int,
        typer.Option(
            "--no-repeat-ngram", "--no-repeat-ngram-size", help="no row of so many tokens comes twice"
        ),
    ] = 0
    greedy: Annotated[bool, typer.Option("--greedy", help="always the most probable token")] = False
    beams: Annotated[
        int, typer.Option("--beams", "--num-beams", help="search with so many beginnings side by side")
    ] = 1
    length_penalty: Annotated[
        float, typer.Option(help="of a search: above 0 longer texts are better, below 0 shorter ones")
    ] = 1.0
    early_stopping: Annotated[
        str, typer.Option(help="when a search ends: no (when nothing better is likely), yes (at once), never")
    ] = "no"
    stop: Annotated[list[str] | None, typer.Option(help="end before this text; may be given again")] = None
    seed: Annotated[int, typer.Option(help="of the draws")] = 1234

    def sampling(self, num_samples: int) -> Sampling:
        """Errors: `ConfigError` for what cannot be."""
        from megalith.generate.sampling import Sampling

        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return Sampling(**{**given, "stop": tuple(self.stop or ())}, num_samples=max(num_samples, 1))


@dataclass(frozen=True)
class Source:
    """What is read, and how."""

    batch_size: BatchSize = 8
    logprobs: Annotated[bool, typer.Option("--logprobs", help="the log-probability of each token too")] = (
        False
    )
    recompute: Annotated[bool, typer.Option("--recompute", help="without the key-value cache")] = False
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos",
            help="begin a GPT's prompt with [BOS], or never; default: as its tokenizer says, and its training here did",
            show_default=False,
        ),
    ] = None
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="what tuning made, by Megalith, PEFT or NeMo: soft prompts that rows ask for, or LoRA; may be given again"
        ),
    ] = None
    force: Annotated[
        bool, typer.Option("--force", help="use --prompts of another base model or tokenizer, too")
    ] = False
    tokenizer: TokenizerPath = None
    config_file: ConfigFile = None
    device: Device = "auto"
    precision: PrecisionName = "auto"


@grouped
def generate(
    checkpoint: Checkpoint, wanted: Wanted, choosing: Choosing, source: Source, keys: Keys = None
) -> None:
    """Continue a prompt, a file of prompts, or nothing (unconditional texts). Tokens are drawn when temperature,
    top-k above 1, top-p or more than one sample is asked for; otherwise each is the most probable one.
    A T5 or BART writes an answer to a prompt, whose blanks (<mask>, <extra_id_0>) it fills; a BERT guesses them.

    Example: megalith generate --checkpoint quickstart/run --prompt "Return a list of" --temperature 0.7
    """
    from megalith.generate.jobs import Options

    check_mode(wanted, source)
    sampling = choosing.sampling(wanted.num_samples)
    copies = "a text that streams" if wanted.streams else ""
    layout = begin(keys, device=source.device, precision=source.precision, copies=copies)
    options = Options(source.batch_size, source.recompute, source.logprobs)
    with reading(layout, patient=wanted.interactive) as crew:
        loaded = load(
            checkpoint,
            layout,
            crew,
            tokenizer=source.tokenizer,
            config_file=source.config_file,
            families=None,
            prompts=source.prompts or (),
            force=source.force,
        )
        loaded = replace(loaded, bos=source.bos)
        if loaded.prompting is not None:
            loaded = replace(loaded, prompting=replace(loaded.prompting, tag=wanted.prompt_tag))
            options = replace(options, logprobs=options.logprobs or not wanted.streams)
        check_family(loaded, sampling, options)
        if wanted.interactive:
            talk(loaded, sampling, options)
        elif wanted.input_file is not None:
            answer_file(loaded, sampling, options, wanted.input_file, output=wanted.output_file or "-")
        elif wanted.prompt is not None:
            answer_prompt(loaded, sampling, options, wanted.prompt, output=wanted.output_file)
        else:
            sample(loaded, sampling, options, wanted.genfile or "-")


def check_mode(wanted: Wanted, source: Source) -> None:
    """Errors: `ConfigError` unless the flags say one thing to do."""
    from megalith.errors import ConfigError, Problem

    asked = {"--prompt": wanted.prompt is not None, "--input-file": wanted.input_file is not None}
    asked["--interactive"] = wanted.interactive
    named = [name for name, given in asked.items() if given]
    problems = []
    if len(named) > 1:
        problems.append(Problem(", ".join(named), "each is a thing of its own to do", "keep one"))
    if not named and not wanted.num_samples:
        fix = "give --prompt TEXT, --input-file FILE, --num-samples N or --interactive"
        problems.append(Problem("generate", "nothing to continue", fix))
    if wanted.num_samples and (asked["--input-file"] or wanted.interactive):
        problems.append(Problem("--num-samples", "goes alone, or with --prompt", "leave it out"))
    if wanted.genfile is not None and (named or not wanted.num_samples):
        fix = "use --output-file, or ask for unconditional texts with --num-samples N alone"
        problems.append(Problem("--genfile", "is where unconditional texts go", fix))
    if wanted.output_file is not None and (wanted.interactive or not named):
        problems.append(Problem("--output-file", "goes with --prompt or --input-file", "leave it out"))
    if wanted.prompt_tag is not None and (wanted.prompt is None and not wanted.interactive):
        fix = 'in a file each row names its own: {"prompt_tag": …, "text": …}'
        problems.append(Problem("--prompt-tag", "goes with --prompt or --interactive", fix))
    if wanted.prompt_tag is not None and not source.prompts:
        problems.append(
            Problem("--prompt-tag", "names a prompt, and no prompts were given", "--prompts FOLDER")
        )
    if problems:
        raise ConfigError(problems)


def check_family(loaded: Loaded, sampling: Sampling, options: Options) -> None:
    """Errors: `ConfigError` for options that mean nothing to this model, and whatever its tokenizer lacks."""
    from megalith.errors import ConfigError, Problem
    from megalith.generate.jobs import unfit

    family = loaded.family.upper()
    flags = unfit(loaded.family, sampling, options)
    if flags:
        fix = "keep --top-k, the number of guesses, and leave the others out"
        raise ConfigError([Problem(", ".join(flags), f"a {family} guesses words and writes no text", fix)])
    loaded.manner  # noqa: B018  # before a prompt is asked for


def answer_prompt(
    loaded: Loaded, sampling: Sampling, options: Options, prompt: str, *, output: str | None
) -> None:
    """One prompt: into a file, or streamed."""
    if output is not None:
        answer_into(loaded, sampling, options, prompt, output=output)
    elif sampling.beams > 1 and sampling.num_samples > 1:
        show_best(loaded, sampling, options, prompt)
    else:
        answer_streaming(loaded, sampling, options, prompt)


def answer_into(loaded: Loaded, sampling: Sampling, options: Options, prompt: str, *, output: str) -> None:
    """One prompt, once or several times, as JSON lines."""
    from megalith.generate.jobs import answer_all
    from megalith.generate.lengths import Lengths
    from megalith.generate.text import search_texts

    lengths = Lengths(loaded.model.config)
    with written(loaded, output) as write:
        if sampling.beams > 1:
            (rows,) = search_texts(loaded, [prompt], sampling, **options.how)
        else:
            rows = answer_all(loaded, [prompt] * sampling.num_samples, sampling, options)
        for row in rows:
            write(lengths.see(row).to_json())
    tell(loaded, lengths.notices())


def answer_streaming(loaded: Loaded, sampling: Sampling, options: Options, prompt: str) -> None:
    """One prompt: streamed, once or several times. A GPT's stands before its continuation."""
    from megalith.generate.jobs import answer
    from megalith.generate.lengths import Lengths

    lengths = Lengths(loaded.model.config)
    for number in range(sampling.num_samples):
        if sampling.num_samples > 1:
            show(f"{chr(10) * bool(number)}--- {number + 1} of {sampling.num_samples} ---\n")
        head = (
            prompt if loaded.family == "gpt" else ""
        )  # not before the first piece is there: it may be refused
        for piece in answer(loaded, prompt, sampling, options, number=number):
            show(head + (piece if isinstance(piece, str) else "\n"))
            head = ""
        lengths.see(piece)
        show_details(loaded, piece)
    tell(loaded, lengths.notices())


def show_best(loaded: Loaded, sampling: Sampling, options: Options, prompt: str) -> None:
    """The best texts of a search, with their scores."""
    from megalith.generate.lengths import Lengths
    from megalith.generate.text import search_texts

    lengths = Lengths(loaded.model.config)
    (rows,) = search_texts(loaded, [prompt], sampling, **options.how)
    head = prompt if loaded.family == "gpt" else ""
    for number, row in enumerate(rows, 1):
        show(
            f"{chr(10) * (number > 1)}--- {number} of {len(rows)}, score {row.score:.4f} ---\n{head}{row.text}\n"
        )
        lengths.see(row)
        show_details(loaded, row)
    tell(loaded, lengths.notices())


def answer_file(loaded: Loaded, sampling: Sampling, options: Options, source: str, *, output: str) -> None:
    """Every line of a file."""
    from megalith.generate.jobs import answer_all
    from megalith.generate.lengths import Lengths
    from megalith.generate.lines import check_prompts, read_prompts

    tagged = loaded.prompting is not None
    prompts = loaded.crew.lead(lambda: read_prompts(source, tagged=tagged))
    check_prompts(loaded, prompts, source)
    lengths = Lengths(loaded.model.config)
    with written(loaded, output, not_over=source) as write, progress(loaded.crew, "prompts") as report:
        for done, row in enumerate(answer_all(loaded, prompts, sampling, options), 1):
            write(lengths.see(row).to_json())
            report(done, len(prompts))
    tell(loaded, lengths.notices())


def sample(loaded: Loaded, sampling: Sampling, options: Options, output: str) -> None:
    """Unconditional texts."""
    from megalith.generate.jobs import sample_all, unconditional_json
    from megalith.generate.lengths import Lengths

    count, lengths = sampling.num_samples, Lengths(loaded.model.config)
    with written(loaded, output) as write, progress(loaded.crew, "samples") as report:
        for done, row in enumerate(sample_all(loaded, count, sampling, options), 1):
            write(unconditional_json(lengths.see(row)))
            report(done, count)
    tell(loaded, lengths.notices())


def talk(loaded: Loaded, sampling: Sampling, options: Options) -> None:
    """Prompts from the keyboard, or from a pipe, one a line."""
    from megalith.cli.errors import show_error
    from megalith.generate.interactive import converse
    from megalith.generate.lengths import Lengths

    person = sys.stdin.isatty()
    if person:
        import readline  # noqa: F401 (input() gets editing and a history by it)

        print("Ctrl-C ends a text, Ctrl-D leaves.", file=sys.stderr)

    def ask() -> str:
        return input("prompt> " if person else "")

    def done(row: Answer) -> None:
        lengths = Lengths(loaded.model.config)
        lengths.see(row)
        show_details(loaded, row)
        tell(loaded, lengths.notices())

    converse(loaded, sampling, options, ask=ask, write=show, complain=show_error, done=done)
    if person:
        show("\n")


@contextmanager
def written(
    loaded: Loaded, path: str, *, not_over: str | None = None
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """`open_lines` of the main process; the others write nothing, and get its error."""
    from megalith.generate.lines import open_lines

    with ExitStack() as stack:
        opened: list[Callable[[Mapping[str, Any]], None]] = []
        loaded.crew.lead(lambda: opened.append(stack.enter_context(open_lines(path, not_over=not_over))))
        yield opened[0] if opened else lambda row: None


def tell(loaded: Loaded, notices: Sequence[str]) -> None:
    """Once, on stderr."""
    from megalith.cli.errors import show_notices

    if loaded.crew.is_main:
        show_notices(notices)


def show(text: str) -> None:
    """Writes at once, so that a reader sees the text grow."""
    sys.stdout.write(text)
    sys.stdout.flush()


def show_details(loaded: Loaded, row: Answer) -> None:
    """Where there are any: a line a token with its log-probability and its probability; a line a guess with its own."""
    import math

    from megalith.cli.output import print_table
    from megalith.generate.guess import Guesses

    tokenizer = loaded.needs_tokenizer()
    if isinstance(row, Guesses):
        lines = [
            (str(number), repr(guess.text), str(guess.token), f"{guess.probability:.4f}")
            for number, guesses in enumerate(row.masks, 1)
            for guess in guesses
        ]
        print_table(("mask", "text", "token", "probability"), lines)
    elif row.logprobs is not None:
        lines = [
            (str(token), repr(tokenizer.decode([token])), f"{p:.4f}", f"{math.exp(p):.4f}")
            for token, p in zip(row.tokens, row.logprobs, strict=True)
        ]
        print_table(("token", "text", "log-probability", "probability"), lines)
