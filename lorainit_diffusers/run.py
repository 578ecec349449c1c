"""Run a training script that knows nothing of this library, and start its LoRA from the data.

    accelerate launch -m lorainit_diffusers.run --init cntlora -- train_dreambooth_lora_flux.py --rank 16 ...

The script runs unmodified. Every `Accelerator` that it makes is attached to (`lorainit_diffusers.attach`); nothing
else of it is touched. What stands after `--` is the script and its own arguments.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the help, and a mistyped option, need no torch
    from lorainit_diffusers.attach import Attached
    from lorainit_diffusers.init_file import InitFile
    from lorainit_diffusers.methods import Initializer


@dataclass(frozen=True)
class LaunchOptions:
    """What the launcher was asked for.

    Attributes:
        script: Path of the script, or name of a module where `is_module`; `script_args` are its own arguments.
        init: Name of the initialisation, with `init_options`.
        init_batches: Losses to collect.
        init_only: Write the init file and end.
        init_file: Where to; `None` for the script's output folder.
        init_from: Init file to start from.
        restart: Collect in a first short run of the script, and start it again with the result.
        report_dir: Folder of the report; `None` for the script's output folder.
        options: Of `lorainit_diffusers.attach.attach`.
    """

    script: str
    script_args: tuple[str, ...] = ()
    is_module: bool = False
    init: str = "cntlora"
    init_options: dict[str, Any] = field(default_factory=dict)
    init_batches: int = 16
    init_only: bool = False
    init_file: Path | None = None
    init_from: Path | None = None
    restart: bool = False
    report_dir: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)


class LaunchError(ValueError):
    """What was asked for cannot be done, and why; not an error of the script."""


class _Collected(BaseException):
    """Ends a script whose initialisation is all that was wanted; no `except Exception` of its own may stop it."""

    def __init__(self, init: InitFile) -> None:
        super().__init__("the initialisation has been collected")
        self.init = init


def parser() -> argparse.ArgumentParser:
    """The command line, without what stands after `--`."""
    parser = argparse.ArgumentParser(
        prog="lorainit_diffusers.run",
        description="Run a LoRA training script unmodified, its LoRA initialised from the data.",
        usage="%(prog)s [options] -- SCRIPT.py [the script's own arguments]",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--init", default="cntlora", metavar="NAME", help="the initialisation, such as cntlora, eva, lora_ga or pissa")
    add("--init_option", nargs="+", default=[], metavar="KEY=VALUE", help="hyper-parameters of the initialisation")
    add("--init_batches", type=int, default=16, metavar="N", help="losses of the script to collect, on each process")
    add("--init_seed", type=int, default=0, metavar="N", help="of the pass and the factors")
    add("--variable_rank", action="store_true", help="allocate ranks by score; starts the script a second time")
    add("--rank_budget", type=int, metavar="N", help="sum of the ranks; as the script has them when left out")
    add("--parameter_budget", type=int, metavar="N", help="number of LoRA parameters, instead of --rank_budget")
    add("--min_rank", type=int, default=1, metavar="N", help="under --variable_rank")
    add("--max_rank", type=int, metavar="N", help="under --variable_rank; twice the script's rank when left out")
    add("--memory_budget_gb", type=float, metavar="GB", help="what the statistics may take")
    add("--no_share_inputs", action="store_true", help="one statistic for each layer, shared inputs or not")
    add("--restart", action="store_true", help="collect in a first short run, then start the script anew")
    add("--init_only", action="store_true", help="write the init file, and end")
    add("--init_file", type=Path, metavar="FILE", help="where to write it; the script's output folder when left out")
    add("--init_from", type=Path, metavar="FILE", help="start from this init file, without a collection pass")
    add("--report_dir", type=Path, metavar="DIR", help="of init_report.json; the script's output folder when left out")
    add("-m", dest="is_module", action="store_true", help="what stands after -- is a module, not a file")
    return parser


def parse(argv: Sequence[str]) -> LaunchOptions:
    """The command line as options.

    Raises:
        SystemExit: It cannot be read; the message says what is wrong.
    """
    arguments = list(argv)
    if "--" in arguments:
        cut = arguments.index("--")
        own, command = arguments[:cut], arguments[cut + 1 :]
    else:
        # before the first thing that is a file, everything is ours
        cut = next((index for index, item in enumerate(arguments) if item.endswith(".py")), len(arguments))
        own, command = arguments[:cut], arguments[cut:]
    made = parser()
    args = made.parse_args(own)
    if command and command[0] == "-m":
        args.is_module, command = True, command[1:]
    if not command:
        made.error("no script: write it and its arguments after --, as in -- train_dreambooth_lora.py --rank 8")
    if args.init_from is not None and (args.init_only or args.variable_rank or args.restart):
        made.error("--init_from starts from a file that is there: leave out --init_only, --variable_rank and --restart")
    if args.init_file is not None and not args.init_only:
        made.error("--init_file says where --init_only writes to: add --init_only, or read a file with --init_from")
    options = {"seed": args.init_seed, "share_inputs": not args.no_share_inputs}
    if args.variable_rank:
        names = ("rank_budget", "parameter_budget", "min_rank", "max_rank")
        options |= {"variable_rank": True, **{name: getattr(args, name) for name in names}}
    elif args.rank_budget or args.parameter_budget or args.max_rank or args.min_rank != 1:
        made.error("--rank_budget, --parameter_budget, --min_rank and --max_rank need --variable_rank")
    if args.memory_budget_gb is not None:
        options["memory_budget_gb"] = args.memory_budget_gb
    pairs: dict[str, Any] = {}
    for pair in args.init_option:
        key, equals, value = pair.partition("=")
        if not equals:
            made.error(f"--init_option {pair!r} is no KEY=VALUE, such as base=down_only")
        pairs[key] = _value(value)
    return LaunchOptions(
        script=command[0],
        script_args=tuple(command[1:]),
        is_module=args.is_module,
        init=args.init,
        init_options=pairs,
        init_batches=args.init_batches,
        init_only=args.init_only,
        init_file=args.init_file,
        init_from=args.init_from,
        restart=args.restart or args.variable_rank,
        report_dir=args.report_dir,
        options=options,
    )


def _value(text: str) -> Any:
    words: dict[str, Any] = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def script_output_dir(script_args: Sequence[str]) -> Path | None:
    """The folder that a script is told to write to, by the option that trainers have for it."""
    found: str | None = None
    for index, argument in enumerate(script_args):
        name, equals, value = argument.partition("=")
        if name.replace("-", "_") == "__output_dir":
            found = value if equals else next(iter(script_args[index + 1 :]), None)
    return None if found is None else Path(found)


def run(options: LaunchOptions) -> None:
    """Run the script as the options say.

    Raises:
        LaunchError: No such script or init file, an unknown method or option; or, at the script's end, nothing was
            initialised.
        BaseException: Whatever the script raises; in its stack, what is wrong with its adapters or data.
    """
    from lorainit_diffusers.init_file import INIT_FILE_NAME, load_init_file, save_init_file
    from lorainit_diffusers.initialize import make_method

    if not options.is_module and not Path(options.script).is_file():
        raise LaunchError(f"there is no script {options.script!r}; write it and its arguments after --")
    try:
        method = make_method(options.init, options.init_options)
        init = None if options.init_from is None else load_init_file(options.init_from)
    except (ValueError, FileNotFoundError) as error:
        raise LaunchError(error) from error
    folder = script_output_dir(options.script_args)
    target = options.init_file or (None if folder is None else folder / INIT_FILE_NAME)
    if options.init_only and target is None:
        raise LaunchError("where should the init file go? The script has no --output_dir: say it with --init_file")
    if not (options.init_only or options.restart):
        _run_script(options, method, init)
        return

    def keep(attached: Attached) -> None:
        init = attached.init_file()
        if target is not None and attached.accelerator.is_main_process:
            save_init_file(init, target)
            print(f"lorainit: the initialisation is in {target}", flush=True)
        attached.accelerator.wait_for_everyone()
        raise _Collected(init)

    init = _run_script(options, method, None, keep)
    if init is None and options.init_only:
        raise LaunchError("the script has resumed a run, which is not initialised anew: no init file was written")
    if init is not None and not options.init_only:
        print("lorainit: the script starts again, from this initialisation", flush=True)
        _run_script(options, method, init)


def _run_script(
    options: LaunchOptions,
    method: Initializer,
    init: InitFile | None,
    on_solved: Callable[[Attached], None] | None = None,
) -> InitFile | None:
    """One run of the script; what it has collected, where `on_solved` ended it for that."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    from lorainit_diffusers.attach import attach
    from lorainit_diffusers.in_loop.rewind import RandomState

    attachments: list[Attached] = []
    original = Accelerator.__init__

    @functools.wraps(original)
    def make_and_attach(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        attached = attach(
            self,
            method,
            init_batches=options.init_batches,
            init_from=init,
            output_dir=options.report_dir or script_output_dir(options.script_args),
            **options.options,
        )
        attached.on_solved = on_solved
        attachments.append(attached)

    argv, path, folder, state = sys.argv, list(sys.path), os.getcwd(), RandomState([])
    Accelerator.__init__ = make_and_attach  # type: ignore[method-assign]
    sys.argv = [options.script, *options.script_args]
    try:
        _run_as_main(options)
        _check_initialised(attachments)
        return None
    except _Collected as collected:
        init = collected.init
        for attached in attachments:
            attached.close()
        attachments.clear()
        for kind in (AcceleratorState, GradientState):  # the script's next Accelerator is its first
            getattr(kind, "_reset_state")()  # noqa: B009
        os.chdir(folder)
        state.restore()
        return init
    finally:
        Accelerator.__init__ = original  # type: ignore[method-assign]
        sys.argv, sys.path[:] = argv, path
        for attached in reversed(attachments):
            attached.close()
        gc.collect()


def _run_as_main(options: LaunchOptions) -> None:
    try:
        if options.is_module:
            runpy.run_module(options.script, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(options.script).resolve().parent))  # as `python script.py` has it
            runpy.run_path(options.script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise


def _check_initialised(attachments: Sequence[Attached]) -> None:
    reasons = [attached.missing() for attached in attachments]
    if not reasons:
        raise LaunchError("the script has ended, and its LoRA was not initialised: it made no accelerate.Accelerator")
    if None not in reasons:
        raise LaunchError(f"the script has ended, and its LoRA was not initialised: {reasons[0]}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: `python -m lorainit_diffusers.run`.

    Raises:
        SystemExit: What was asked for cannot be done, in one line; or the script's own.
    """
    options = parse(sys.argv[1:] if argv is None else argv)
    try:
        run(options)
    except LaunchError as error:
        sys.exit(f"lorainit: {error}")


if __name__ == "__main__":
    main()
