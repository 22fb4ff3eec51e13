"""`nmexport serve`: a local tritonserver on what was packaged, until it is told to stop."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from nmexport.cli.options import takes
from nmexport.cli.output import emit_json, wants_json
from nmexport.cli.verb import UserPath, Verb

if TYPE_CHECKING:
    from nmexport.cli.request import Request
    from nmexport.serving.addresses import Addresses
    from nmexport.serving.launch import Installation


@click.command("serve", cls=Verb, short_help="Start Triton on what was packaged.")
@click.argument("folder", required=False, type=UserPath(path_type=Path, exists=True))
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Listen here; 0.0.0.0 is the network."
)
@click.option("--http-port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@click.option("--grpc-port", type=click.IntRange(1, 65535), default=8001, show_default=True)
@click.option("--metrics-port", type=click.IntRange(1, 65535), default=8002, show_default=True)
@click.option(
    "--openai-port",
    type=click.IntRange(0, 65535),
    default=9000,
    show_default=True,
    help="Port of OpenAI's API; 0 leaves it out.",
)
@click.option(
    "--server",
    type=UserPath(path_type=Path, dir_okay=False),
    help="tritonserver to start.  [default: on PATH, /opt/tritonserver, the nvidia-pytriton wheel]",
)
@click.option(
    "--env",
    type=UserPath(path_type=Path, file_okay=False),
    help="Virtual environment that the model runs in.  [default: this one]",
)
@click.option(
    "--ready-seconds",
    type=click.IntRange(1),
    default=600,
    show_default=True,
    help="Seconds that the server may take to be ready.",
)
@click.option(
    "--drain-seconds",
    type=click.IntRange(0),
    default=30,
    show_default=True,
    help="Seconds that requests in flight may take once the server is told to stop.",
)
@takes()
@click.pass_context
def serve_command(
    ctx: click.Context,
    *,
    asked: Request,
    folder: Path | None,
    host: str,
    http_port: int,
    grpc_port: int,
    metrics_port: int,
    openai_port: int,
    server: Path | None,
    env: Path | None,
    ready_seconds: int,
    drain_seconds: int,
) -> None:
    """Serve FOLDER, a work directory or a package, with a tritonserver of this machine.

    Says when it is ready. Ctrl-C and SIGTERM finish requests in flight, then stop it.

    Gates hold when a model is packaged; `nmexport gate` on a report afterwards changes no package.
    """
    from nmexport.serving import launch
    from nmexport.serving.addresses import Addresses
    from nmexport.serving.repository import REPOSITORY

    package = launch.package_folder(folder or asked.existing_work().root)
    addresses = Addresses(
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        openai_port=openai_port,
    )
    installation = launch.find_server(server)
    with launch.Server.start(
        package / REPOSITORY,
        addresses=addresses,
        installation=installation,
        models=_servable(package / REPOSITORY, installation),
        env=env,
        drain_seconds=drain_seconds,
        plugins=launch.plugins_of(package),
    ) as running:
        try:
            seconds = running.wait_ready(ready_seconds)
            _say_ready(ctx, package, addresses, seconds)
            code = running.process.wait()
        except KeyboardInterrupt:
            code = running.stop()
    if code:
        from nmexport.errors import EnvironmentFault

        raise EnvironmentFault(
            f"tritonserver ended with code {code}.", fix="see its messages above"
        )


def _servable(repository: Path, installation: Installation) -> list[str]:
    """Name the models to load where not all can be; text is served even if a plan cannot be."""
    from nmexport.serving import launch

    models = launch.models_of(repository)
    plans = [name for name, is_plan in models.items() if is_plan]
    why = launch.why_no_plans(installation) if plans else None
    if why is None:
        return []
    click.echo(f"nmexport: {', '.join(plans)} is not served: {why}", err=True)
    return [name for name, is_plan in models.items() if not is_plan]


def _say_ready(ctx: click.Context, package: Path, where: Addresses, seconds: float) -> None:
    from nmexport.serving import launch
    from nmexport.serving.openai.opening import INSTALL

    is_served = where.openai is not None and launch.serves_openai(where.openai)
    openai = where.openai if is_served else None
    urls = {"http": where.http, "grpc": where.grpc, "metrics": where.metrics, "openai": openai}
    if wants_json(ctx):
        emit_json({"package": str(package), "ready_seconds": round(seconds, 3), **urls})
        return
    click.echo(f"Ready after {seconds:.1f} s: {where.http} (gRPC {where.grpc})")
    if openai is not None:
        click.echo(f"OpenAI's API, for any client of it: {openai}")
    elif where.openai is not None:
        click.echo(f"OpenAI's API is not served; it needs: {INSTALL}")
    click.echo(f'Try it: nmexport client --url {where.http} "The capital of France is"')
