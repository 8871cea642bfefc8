"""The command line `v2v`: one group per person who types it. Nothing imports this room.

Rules
* A command's module is imported only when it runs: `v2v --help` and `v2v charger` on a Raspberry Pi must not wait for web3.
* Errors are one of `agent.errors`' families: printed with their remedy, exit code by family. A traceback is a bug.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

import click

from agent.errors import EXIT_DONE, EXIT_USAGE, AgentError

# name -> (module:attribute, what `v2v --help` says)
COMMANDS = {
    "demo": (
        "agent.cli.demo:demo",
        "One whole evening on this machine: market, two providers, one consumer.",
    ),
    "provider": ("agent.cli.provider:provider", "The owner who sells: run the agent, bid, look at sessions."),
    "consumer": ("agent.cli.consumer:consumer", "The driver who buys: charge, or each step by itself."),
    "organisation": (
        "agent.cli.organisation:organisation",
        "Who runs the market: deploy, add and remove EVs.",
    ),
    "charger": (
        "agent.cli.charger:charger",
        "The installer's and tester's tools: find, look, try, simulate.",
    ),
    "key": ("agent.cli.key:key", "Key files: make one, take one over, see whose it is."),
    "verify": ("agent.cli.verify:verify", "Check an exported session without a network."),
    "config": ("agent.cli.config:config", "Check a configuration file before it is used."),
    "devnet": ("agent.cli.devnet:devnet", "A throw-away chain on this machine, for trying things."),
}


class LazyGroup(click.Group):
    """A group whose commands live in modules that are imported only when they run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of COMMANDS."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of this command; None for an unknown name."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name][0].split(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does it, but an unknown name is compared with COMMANDS: click's own list is empty here."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            raise click.NoSuchCommand(name, possibilities=COMMANDS, ctx=ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="v2v-agent")
def cli() -> None:
    """Let one electric car sell energy to another, with no company in the middle."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script: run, and turn our errors into one message and one exit code. Always ends in SystemExit.

    `arguments` as typed after `v2v`; None: those of this process.
    """
    try:
        done = cli.main(arguments, prog_name="v2v", standalone_mode=False)
        sys.exit(
            done if isinstance(done, int) else EXIT_DONE
        )  # click returns the code of --help and its like
    except click.Abort:
        sys.exit(130)  # 128 + SIGINT, as shells have it
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_USAGE)
    except AgentError as error:
        click.echo(f"v2v: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # `v2v ... | head`: whoever read us has seen enough. Python would complain once more while it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # 128 + SIGPIPE
