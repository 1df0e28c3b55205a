"""``pytq eval``: quality of cache types against an f16 cache; ``pytq eval needle``: retrieval."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click

from pytq.errors import PytqError

TABLE_WIDTH = 130


class _DefaultGroup(click.Group):
    """``pytq eval MODEL`` runs the command ``kld``; a subcommand's name comes first otherwise."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args.insert(0, "kld")
        return super().parse_args(ctx, args)


@click.group(
    "eval",
    cls=_DefaultGroup,
    help="Quality of KV cache types against an f16 cache: `pytq eval MODEL`, `pytq eval needle MODEL`.",
)
def command() -> None:
    pass


def _pairs(types: str) -> list[tuple[str, str]]:
    from pytq.estimate import parse_pairs

    return parse_pairs(types)


def _setup(
    model: Path, text: Path | None, ctx: int, chunks: int, threads: int | None, profile: str | None
) -> Any:
    from pytq import estimate, evaluate
    from pytq.gguf.layout import read_layout
    from pytq.model import gguf_check
    from pytq.profile import load_profile
    from pytq.textfile import read_text

    gguf_check(model)
    estimate.check_ctx(estimate.open_model(model), estimate.Plan(ctx))
    if text is not None:
        read_text(text)
    if profile not in (None, "none"):
        load_profile(Path(str(profile)), read_layout(model))
    return evaluate.Setup(model, text or evaluate.default_text_file(), ctx, chunks, threads, profile)


@command.command(
    "kld", help="Mean, median, 99 % and 99.9 % KL divergence, same top token, perplexity and bits per value."
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--types", default=None, help="TYPE or K/V, separated by commas.  [default: q8_0,q5_1,q4_0,kv4,kv3,kv2]"
)
@click.option(
    "--text", type=click.Path(path_type=Path), help="Text to predict; default: Python's language reference."
)
@click.option("--ctx", default=2048, show_default=True, type=click.IntRange(min=64), help="Tokens per chunk.")
@click.option(
    "--chunks",
    default=6,
    show_default=True,
    type=click.IntRange(min=1),
    help="Chunks; more give smaller errors.",
)
@click.option("--profile", help="kv profile, or 'none'; default: beside the model or inside it.")
@click.option("--no-noise", is_flag=True, help="Skip the noise floor (f16 against f16 with other batches).")
@click.option("--plot", type=click.Path(path_type=Path), help="Picture of KLD against bits per value.")
@click.option("-t", "--threads", type=click.IntRange(min=1), help="CPU threads.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON only.")
def kld(
    model: Path,
    types: str | None,
    text: Path | None,
    ctx: int,
    chunks: int,
    profile: str | None,
    no_noise: bool,
    plot: Path | None,
    threads: int | None,
    as_json: bool,
) -> None:
    from pytq import estimate, evaluate
    from pytq.paths import find_build
    from pytq.progress import say, step

    pairs = _pairs(types or ",".join(evaluate.DEFAULT_TYPES))
    setup = _setup(model, text, ctx, chunks, threads, profile)
    stock = find_build("stock")
    if any(
        evaluate.build_for(k, v, stock, lambda: stock) is not stock
        or estimate.is_pytq(k)
        or estimate.is_pytq(v)
        for k, v in pairs
    ):
        from pytq.calibrate import constant_key_warning

        find_build("patched")
        for k, v in pairs:
            evaluate.cache_bits(setup, k, v)  # refuses types that do not fit before anything runs
        warning = constant_key_warning(model)
        if warning and profile == "none":
            say(f"warning: {warning}")
    with step("f16 reference", chunks) as progress:
        base = evaluate.reference(setup, stock, progress.update)
    floor = None
    if not no_noise:
        with step("noise floor", chunks) as progress:
            floor = evaluate.noise_floor(setup, stock, base, progress.update)
    scores = []
    for k, v in pairs:
        with step(estimate.pair_name(k, v), chunks) as progress:
            build = evaluate.build_for(k, v, stock, lambda: find_build("patched"))
            scores.append(evaluate.score(setup, build, base, k, v, progress.update))
    if plot is not None:
        evaluate.plot(scores, floor, plot)
    if as_json:
        payload = {
            "metric_version": evaluate.METRIC_VERSION, "model": str(model), "text": str(setup.text), "ctx": ctx, "chunks": chunks,
            "profile": profile or "default", "noise_floor": evaluate.rows([floor])[0] if floor else None, "scores": evaluate.rows(scores),
        }  # fmt: skip
        click.echo(json.dumps(payload, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{model.name}: {chunks} chunks of {ctx} tokens, KL divergence from the f16 cache")
    for title in ("type", "bits", "mean KLD", "median", "99 %", "99.9 %", "same top", "PPL", "build"):
        table.add_column(title, justify="left" if title in ("type", "build") else "right", no_wrap=True)
    for s in [*([floor] if floor else []), *scores]:
        table.add_row(
            s.name, f"{s.bits:.3f}", f"{s.kld_mean:.5f} ± {s.kld_mean_err:.5f}", f"{s.kld_median:.5f}", f"{s.kld_p99:.4f}",
            f"{s.kld_p999:.4f}",
            f"{s.same_top:.2f} ± {s.same_top_err:.2f} %", f"{s.ppl:.4f} ± {s.ppl_err:.4f}", s.build,
        )  # fmt: skip
    # figures are never cut: a narrow terminal wraps whole lines instead
    Console(width=max(Console().width, TABLE_WIDTH)).print(table)


@command.command(
    "needle", help="Find one planted number at several depths and lengths; reports only where f16 finds it."
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--types", default="q4_0,kv4,kv3", show_default=True, help="TYPE or K/V, separated by commas.")
@click.option(
    "--text", type=click.Path(path_type=Path), help="Haystack; default: Python's language reference."
)
@click.option(
    "--lengths", default="250,500,1000", show_default=True, help="Words of haystack, separated by commas."
)
@click.option("--depths", default="0.1,0.5,0.9", show_default=True, help="Places of the needle, 0 to 1.")
@click.option("--profile", help="kv profile, or 'none'; default: beside the model or inside it.")
@click.option("-t", "--threads", type=click.IntRange(min=1), help="CPU threads.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON only.")
def needle(
    model: Path,
    types: str,
    text: Path | None,
    lengths: str,
    depths: str,
    profile: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    from pytq import estimate, evaluate
    from pytq.paths import find_build
    from pytq.progress import step

    pairs = _pairs(types)
    try:
        sizes = [int(x) for x in lengths.split(",")]
        places = [float(x) for x in depths.split(",")]
    except ValueError as error:
        raise PytqError(
            f"--lengths takes whole numbers and --depths numbers from 0 to 1, separated by commas: {error}"
        ) from error
    if any(n < 1 for n in sizes) or any(not 0 <= p <= 1 for p in places):
        raise PytqError("--lengths must be positive and --depths lie between 0 and 1")
    # three tokens a word leave room for any tokenizer
    setup = _setup(model, text, 3 * max(sizes) + 256, 1, threads, profile)
    body = setup.text.read_text(encoding="utf-8", errors="replace")
    stock = find_build("stock")
    results: list[Any] = []
    skipped = 0
    with step("needle", len(sizes) * len(places)) as progress, tempfile.TemporaryDirectory() as directory:
        for i, size in enumerate(sizes):
            for j, place in enumerate(places):
                number = str(10007 + 7919 * (i * len(places) + j) % 89989)
                prompt = Path(directory) / "prompt.txt"
                prompt.write_text(evaluate.haystack(body, size, place, number), encoding="utf-8")
                if number in evaluate.ask(setup, stock, "f16", "f16", prompt):
                    found = {}
                    for k, v in pairs:
                        build = evaluate.build_for(k, v, stock, lambda: find_build("patched"))
                        found[estimate.pair_name(k, v)] = number in evaluate.ask(setup, build, k, v, prompt)
                    results.append(evaluate.Needle(size, place, number, found))
                else:
                    skipped += 1
                progress.update(i * len(places) + j + 1)
    if as_json:
        click.echo(json.dumps({"skipped": skipped, "results": [r.__dict__ for r in results]}, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{model.name}: needles that the f16 cache finds ({len(results)} of {len(results) + skipped})"
    )
    for title in ("words", "depth", *(estimate.pair_name(k, v) for k, v in pairs)):
        table.add_column(title, justify="right")
    for r in results:
        table.add_row(str(r.length), f"{r.depth:g}", *("found" if ok else "lost" for ok in r.found.values()))
    Console().print(table)
