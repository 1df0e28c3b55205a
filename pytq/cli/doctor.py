"""``pytq doctor``: is this machine set up, and do the kernels work here?"""

from __future__ import annotations

from pathlib import Path

import click

from pytq import paths


@click.command("doctor")
@click.option(
    "--full", is_flag=True, help="Also run the patched build with every type and head size (a minute)."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON only.")
@click.option(
    "--report",
    "target",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="With --full: also write a report on this GPU to send back (docs/backends.md).",
)
@click.option(
    "--backend",
    type=click.Choice(paths.BACKENDS),
    help="The build that the report tests; default: the first GPU build there is.",
)
@click.pass_context
def command(ctx: click.Context, full: bool, as_json: bool, target: Path | None, backend: str | None) -> None:
    """Check tools, builds, versions and kernels; changes nothing.

    Exit code 0: all well, 1: warnings, 2: problems.
    """
    from pytq import doctor
    from pytq.errors import PytqError

    if target is not None and not full:
        raise PytqError("--report needs --full: a report without the kernels' tests says nothing")
    if target is not None and not target.absolute().parent.is_dir():
        raise PytqError(f"{target.absolute().parent} is no directory")
    findings = doctor.run(full)
    if target is not None:
        from pytq import hardware

        hardware.write(hardware.report(findings, backend), target)
    if as_json:
        click.echo(doctor.as_json(findings))
        ctx.exit(doctor.exit_code(findings))
    marks = {doctor.OK: ("ok", "green"), doctor.WARN: ("!!", "yellow"), doctor.FAIL: ("XX", "red")}
    for finding in findings:
        mark, colour = marks[finding.level]
        click.echo(f"{click.style(mark, fg=colour)}  {finding.name}: {finding.found}")
        if finding.level != doctor.OK:
            click.echo(f"      why: {finding.why}")
            if finding.do:
                click.echo(f"      do:  {finding.do}")
    worst = doctor.exit_code(findings)
    if target is not None:
        click.echo(f"report written to {target}: read it, then send it as an issue")
    click.echo(["all well", "some warnings", "there are problems"][worst])
    ctx.exit(worst)
