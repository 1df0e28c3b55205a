"""``pytq doctor``: is this machine set up, and do the kernels work here?"""

from __future__ import annotations

import click


@click.command("doctor")
@click.option(
    "--full", is_flag=True, help="Also run the patched build with every type and head size (a minute)."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON only.")
@click.pass_context
def command(ctx: click.Context, full: bool, as_json: bool) -> None:
    """Check tools, builds, versions and kernels; changes nothing.

    Exit code 0: all well, 1: warnings, 2: problems.
    """
    from pytq import doctor

    findings = doctor.run(full)
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
    click.echo(["all well", "some warnings", "there are problems"][worst])
    ctx.exit(worst)
