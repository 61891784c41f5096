"""`megalith generate`: text from a checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    from megalith.generate.jobs import Options
    from megalith.generate.loading import Loaded
    from megalith.generate.sampling import Sampling
    from megalith.generate.text import Completion

Prompt = Annotated[str | None, typer.Option(help="text to continue")]
InputFile = Annotated[
    str | None,
    typer.Option(
        "--input-file",
        "--sample-input-file",
        help="prompts, one a line; .jsonl: strings, or objects with a prompt; - is stdin",
    ),
]
OutputFile = Annotated[
    str | None,
    typer.Option(
        "--output-file",
        "--sample-output-file",
        help="one JSON object a prompt, in order; - (default for --input-file) is stdout",
    ),
]
NumSamples = Annotated[
    int, typer.Option(min=0, help="so many unconditional texts, all different; with --prompt, of that prompt")
]
GenFile = Annotated[
    str | None,
    typer.Option(help="JSON lines of the unconditional texts: text, length, finished; default: stdout"),
]
Interactive = Annotated[
    bool, typer.Option("--interactive", help="ask for prompts; Ctrl-C ends a text, Ctrl-D leaves")
]
MaxTokens = Annotated[int, typer.Option("--tokens-to-generate", "--out-seq-length", help="at most")]
MinTokens = Annotated[int, typer.Option(help="no end of document before")]
Temperature = Annotated[float | None, typer.Option(help="below 1 sharper, above 1 flatter; 0 is greedy")]
TopK = Annotated[int | None, typer.Option("--top-k", "--top_k", help="draw from the k most probable tokens")]
TopP = Annotated[
    float | None, typer.Option("--top-p", "--top_p", help="draw from the smallest set with this probability")
]
Penalty = Annotated[float, typer.Option(help="above 1 discourages tokens already there")]
Greedy = Annotated[bool, typer.Option("--greedy", help="always the most probable token")]
Stop = Annotated[list[str] | None, typer.Option(help="end before this text; may be given again")]
Seed = Annotated[int, typer.Option(help="of the draws")]
LogProbs = Annotated[bool, typer.Option("--logprobs", help="the log-probability of each token too")]
Recompute = Annotated[bool, typer.Option("--recompute", help="without the key-value cache")]


def generate(
    checkpoint: Checkpoint,
    prompt: Prompt = None,
    input_file: InputFile = None,
    output_file: OutputFile = None,
    num_samples: NumSamples = 0,
    genfile: GenFile = None,
    interactive: Interactive = False,
    tokens_to_generate: MaxTokens = 64,
    min_tokens_to_generate: MinTokens = 0,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    repetition_penalty: Penalty = 1.0,
    greedy: Greedy = False,
    stop: Stop = None,
    seed: Seed = 1234,
    logprobs: LogProbs = False,
    recompute: Recompute = False,
    batch_size: BatchSize = 8,
    tokenizer: TokenizerPath = None,
    config_file: ConfigFile = None,
    device: Device = "auto",
    precision: PrecisionName = "auto",
    keys: Keys = None,
) -> None:
    """Continue a prompt, a file of prompts, or nothing (unconditional texts). Tokens are drawn when temperature,
    top-k above 1, top-p or more than one sample is asked for; otherwise each is the most probable one.

    Example: megalith generate --checkpoint quickstart/run --prompt "Return a list of" --temperature 0.7
    """
    from megalith.generate.jobs import Options
    from megalith.generate.sampling import Sampling

    check_mode(
        prompt, input_file, num_samples, interactive=interactive, output_file=output_file, genfile=genfile
    )
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        tokens_to_generate=tokens_to_generate,
        min_tokens_to_generate=min_tokens_to_generate,
        stop=tuple(stop or ()),
        seed=seed,
        greedy=greedy,
        num_samples=max(num_samples, 1),
    )
    streams = interactive or (prompt is not None and output_file is None)
    layout = begin(keys, device=device, precision=precision, copies="a text that streams" if streams else "")
    options = Options(batch_size, recompute, logprobs)
    with reading(layout, patient=interactive) as crew:
        loaded = load(checkpoint, layout, crew, tokenizer=tokenizer, config_file=config_file)
        if interactive:
            talk(loaded, sampling, options)
        elif input_file is not None:
            continue_file(loaded, sampling, options, input_file, output=output_file or "-")
        elif prompt is not None:
            answer(loaded, sampling, options, prompt, output=output_file)
        else:
            sample(loaded, sampling, options, genfile or "-")


def check_mode(
    prompt: str | None,
    input_file: str | None,
    num_samples: int,
    *,
    interactive: bool,
    output_file: str | None,
    genfile: str | None,
) -> None:
    """Errors: `ConfigError` unless the flags say one thing to do."""
    from megalith.errors import ConfigError, Problem

    asked = {"--prompt": prompt is not None, "--input-file": input_file is not None}
    asked["--interactive"] = interactive
    named = [name for name, given in asked.items() if given]
    problems = []
    if len(named) > 1:
        problems.append(Problem(", ".join(named), "each is a thing of its own to do", "keep one"))
    if not named and not num_samples:
        fix = "give --prompt TEXT, --input-file FILE, --num-samples N or --interactive"
        problems.append(Problem("generate", "nothing to continue", fix))
    if num_samples and (asked["--input-file"] or interactive):
        problems.append(Problem("--num-samples", "goes alone, or with --prompt", "leave it out"))
    if genfile is not None and (named or not num_samples):
        fix = "use --output-file, or ask for unconditional texts with --num-samples N alone"
        problems.append(Problem("--genfile", "is where unconditional texts go", fix))
    if output_file is not None and (interactive or not named):
        problems.append(Problem("--output-file", "goes with --prompt or --input-file", "leave it out"))
    if problems:
        raise ConfigError(problems)


def answer(loaded: Loaded, sampling: Sampling, options: Options, prompt: str, *, output: str | None) -> None:
    """One prompt: into a file, or streamed."""
    if output is not None:
        continue_into(loaded, sampling, options, prompt, output=output)
    else:
        continue_prompt(loaded, sampling, options, prompt)


def continue_into(loaded: Loaded, sampling: Sampling, options: Options, prompt: str, *, output: str) -> None:
    """One prompt, once or several times, as JSON lines."""
    from megalith.generate.jobs import continue_all
    from megalith.generate.lengths import Lengths

    lengths = Lengths(loaded.model.config)
    with written(loaded, output) as write:
        for row in continue_all(loaded, [prompt] * sampling.num_samples, sampling, options):
            write(lengths.see(row).to_json())
    tell(loaded, lengths.notices())


def continue_prompt(loaded: Loaded, sampling: Sampling, options: Options, prompt: str) -> None:
    """One prompt: streamed, once or several times."""
    from megalith.generate.lengths import Lengths
    from megalith.generate.text import Completion, stream

    lengths = Lengths(loaded.model.config)
    for number in range(sampling.num_samples):
        if sampling.num_samples > 1:
            show(f"{chr(10) * bool(number)}--- {number + 1} of {sampling.num_samples} ---\n")
        pieces = stream(
            loaded, prompt, sampling, number=number, recompute=options.recompute, logprobs=options.logprobs
        )
        head = prompt  # shown when its first piece is there: a prompt that is refused is not
        for piece in pieces:
            show(head + ("\n" if isinstance(piece, Completion) else piece))
            head = ""
        lengths.see(piece)
        if options.logprobs:
            show_logprobs(loaded, piece)
    tell(loaded, lengths.notices())


def continue_file(loaded: Loaded, sampling: Sampling, options: Options, source: str, *, output: str) -> None:
    """Every line of a file."""
    from megalith.generate.jobs import continue_all
    from megalith.generate.lengths import Lengths
    from megalith.generate.lines import check_prompts, read_prompts

    prompts = loaded.crew.lead(lambda: read_prompts(source))
    check_prompts(loaded, prompts, source)
    lengths = Lengths(loaded.model.config)
    with written(loaded, output, not_over=source) as write, progress(loaded.crew, "prompts") as report:
        for done, row in enumerate(continue_all(loaded, prompts, sampling, options), 1):
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

    def done(row: Completion) -> None:
        lengths = Lengths(loaded.model.config)
        lengths.see(row)
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


def show_logprobs(loaded: Loaded, row: Completion) -> None:
    """A line a token: its text, its log-probability and its probability."""
    import math

    from megalith.cli.output import print_table

    tokenizer = loaded.needs_tokenizer()
    pairs = zip(row.tokens, row.logprobs or (), strict=True)
    print_table(
        ("token", "text", "log-probability", "probability"),
        [
            (str(token), repr(tokenizer.decode([token])), f"{p:.4f}", f"{math.exp(p):.4f}")
            for token, p in pairs
        ],
    )
