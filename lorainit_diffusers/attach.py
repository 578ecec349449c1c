"""An initialisation for any training loop that computes its loss through an `Accelerator`.

`attach` needs nothing of the loop: no family, no loss function, no batches. It watches the loop's own
`Accelerator`. The first losses that reach `backward` are the collection pass; during it no parameter, optimiser or
scheduler moves and no step is counted. Then it solves, sets the adapters in place, and gives the loop back the batches
and random numbers that the pass has taken: what follows is the training that the loop would have done anyway, from
another start.

Collection itself is `initialize`, which runs in turns with the loop.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lorainit_diffusers import adapters
from lorainit_diffusers.export.checkpoint_hooks import UNSUPPORTED
from lorainit_diffusers.files import write_text
from lorainit_diffusers.hooks import watch_calls
from lorainit_diffusers.in_loop.checkpointing import Checkpoints
from lorainit_diffusers.in_loop.components import agree, are_trained, component_names, is_adapted, unwrapped
from lorainit_diffusers.in_loop.data_key import data_key
from lorainit_diffusers.in_loop.handoff import Handoff
from lorainit_diffusers.in_loop.rewind import RandomState, plain, rewinding
from lorainit_diffusers.in_loop.still import replaced, standing_still
from lorainit_diffusers.in_loop.written import WrittenFiles
from lorainit_diffusers.init_file import InitFile, apply_init, data_difference, init_of
from lorainit_diffusers.initialize import CollectOptions, initialize, make_method
from lorainit_diffusers.methods import Initializer
from lorainit_diffusers.ranges import COUNT
from lorainit_diffusers.rank_plan import RankOptions
from lorainit_diffusers.report import InitReport

REPORT_NAME = "init_report.json"
SUMMARY_NAME = "init_summary.txt"
# Arguments of `initialize` that `attach` passes on.
OPTIONS = (
    *("variable_rank", "rank_budget", "parameter_budget", "min_rank", "max_rank", "seed"),
    *("share_inputs", "memory_budget_gb", "statistics_device", "progress"),
)
_NO_MODEL = (
    "no model with a PEFT adapter went through accelerator.prepare: add the adapter (add_adapter or get_peft_model) "
    "before, and pass the model itself"
)


def attach(
    accelerator: Accelerator,
    method: str | Initializer = "cntlora",
    *,
    init_batches: int = 16,
    init_from: InitFile | None = None,
    output_dir: str | Path | None = None,
    adapter_name: str = "default",
    **options: Any,
) -> Attached:
    """Initialise the adapters of a training loop from its own first losses.

    One line, after `prepare`::

        unet, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(...)
        lorainit_diffusers.attach(accelerator, "cntlora")

    The loop stays as it is. Its first `init_batches` losses on each process are collected; it then trains on the
    batches, and with the noise, that it would have had without them. Checkpoints of `accelerator.save_state` keep the
    adapters exactly, and `load_state` restores them: a resumed run is never initialised anew. What
    `pipeline.save_lora_weights` writes is right on the original base.

    Args:
        accelerator: Of the loop. The models that it prepared, or prepares later, with this adapter are initialised.
        method: A name from `METHODS`, or a configured instance.
        init_batches: Losses to collect, on each process; methods that observe nothing take none.
        init_from: Start from this file's initialisation instead of collecting one.
        output_dir: Folder for the report and a summary; nothing is written when left out.
        adapter_name: PEFT's name of the adapters.
        options: Of `initialize`: `variable_rank` and its budgets, `seed`,
            `share_inputs`, `memory_budget_gb`, `statistics_device`, `progress`.

    Returns:
        What became of it: `report` once the pass is over.

    Raises:
        ValueError: An unknown method or option, or processes that shard the parameters. In the loop, as `initialize`.
    """
    return Attached(accelerator, method, init_batches, init_from, output_dir, adapter_name, options)


class Attached:
    """An initialisation that waits in a training loop, happens, and is over.

    Attributes:
        report: Of the initialisation; `None` before it, in a resumed run, and under `init_from`.
        stage: `"waiting"` for the first step, `"collecting"`, `"solved"` until the step of the last loss ends, or
            `"over"`.
        outcome: One line on what was done; empty before.
        on_solved: Called when the adapters are set; what it raises ends the loop.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        method: str | Initializer,
        init_batches: int,
        init_from: InitFile | None,
        output_dir: str | Path | None,
        adapter_name: str,
        options: Mapping[str, Any],
    ) -> None:
        COUNT.check("init_batches", init_batches)
        unknown = [name for name in options if name not in OPTIONS]
        if unknown:
            raise ValueError(f"attach has no option {unknown[0]!r}; known: {', '.join(OPTIONS)}")
        for kind in (RankOptions, CollectOptions):  # which check their values
            kind(**{name: value for name, value in options.items() if name in kind.__dataclass_fields__})
        if accelerator.distributed_type in UNSUPPORTED:
            raise ValueError(
                f"an initialisation inside the loop needs whole parameters, which {accelerator.distributed_type.value} "
                "does not keep; launch one process, or data parallelism (MULTI_GPU)"
            )
        self.method = make_method(method) if isinstance(method, str) else method
        self.report: InitReport | None = None
        self.stage: Literal["waiting", "collecting", "solved", "over"] = "waiting"
        self.outcome = ""
        self.on_solved: Callable[[Attached], None] | None = None
        self.asked_ranks: dict[str, int] = {}
        self.num_losses = 0
        self.accelerator = accelerator
        self._init_batches = init_batches
        self._init_from = init_from
        self._output_dir = None if output_dir is None else Path(output_dir)
        self._adapter_name = adapter_name
        self._options = dict(options)
        self._models: list[nn.Module] = []  # as prepared
        self._inner: list[nn.Module] = []  # unwrapped
        self._random: RandomState | None = None
        self._pass: Handoff[Tensor, InitReport] | None = None
        self._pass_scope = ExitStack()  # what stands still during the pass
        self._scope = ExitStack()  # what is watched until the pass is over
        self._accumulates = False
        self.files = WrittenFiles(self._known, adapter_name, self.say)
        self._checkpoints = Checkpoints(
            accelerator,
            adapter_name,
            self.files,
            initialised=self._known,
            modules=lambda: self.modules,
            loaded=self._loaded,
            may_reshape=lambda: self.stage == "waiting" and self.accelerator.num_processes == 1,
        )
        self._watch()

    # Models and data

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The adapted models, unwrapped, by the name that pipelines give them."""
        return component_names(self._inner)

    def add_model(self, model: nn.Module, prepared: nn.Module) -> None:
        """Take a model in that carries the adapter; others are none of ours.

        Args:
            model: Before `prepare`.
            prepared: What `prepare` made of it.
        """
        inner = unwrapped(model)
        if not is_adapted(inner, self._adapter_name) or any(inner is known for known in self._inner):
            return
        self._inner.append(inner)
        self._models.append(prepared)
        adapters.check_plain(inner, self._adapter_name)
        if self.stage == "waiting":
            calls = {id(prepared): prepared, id(inner): inner}  # a loop may call either
            self._scope.callback(watch_calls(calls.values(), self._step_begins).close)

    def before_wrapping(self, model: nn.Module) -> None:
        """What must be done to an adapted model before data parallelism wraps it and takes its shapes and dtypes.

        Factors become float32, as initialisations have them; those of an init file are set.
        """
        inner = unwrapped(model)
        for layer in adapters.lora_layers(inner, self._adapter_name).values():
            for holder in (layer.lora_A, layer.lora_B):
                for parameter in holder[self._adapter_name].parameters():
                    parameter.data = parameter.data.float()
        if self._init_from is not None and self.stage == "waiting":
            # its name depends on the models before it, not on those after it
            names = component_names([*self._inner, inner])
            component = next(name for name, value in names.items() if value is inner)
            apply_init(self._init_from, {component: inner}, self._adapter_name)

    def entering(self, loader: Any) -> None:
        """An iteration over a prepared data loader begins, which may be the training loop's."""
        if self.stage == "waiting":
            self._random = RandomState(_held(self.accelerator, "_dataloaders"))

    @property
    def running(self) -> bool:
        """Whether the loop's steps are the pass's."""
        return self.stage in ("collecting", "solved")

    @property
    def over(self) -> bool:
        """Whether the loop trains by itself."""
        return self.stage == "over"

    def drawing(self) -> None:
        """A step of the loop has ended."""
        if self.stage == "solved":
            self._release()

    # The accelerator

    def _watch(self) -> None:
        """See what the loop does with its accelerator, until the pass is over."""
        accelerator = self.accelerator
        prepare_model, prepare_data_loader = accelerator.prepare_model, accelerator.prepare_data_loader
        backward, accumulate = accelerator.backward, accelerator.accumulate

        def prepare_and_add(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not is_adapted(model, self._adapter_name) or any(unwrapped(model) is known for known in self._inner):
                return prepare_model(model, *args, **kwargs)
            self.before_wrapping(model)
            prepared = prepare_model(model, *args, **kwargs)
            self.add_model(model, prepared)
            return prepared

        def watch_backward(loss: Tensor, **kwargs: Any) -> None:
            if not self._takes(loss):
                backward(loss, **kwargs)

        @contextmanager
        def watch_accumulate(*models: Any) -> Generator[None, None, None]:
            self._accumulates = True
            self._step_begins()
            with nullcontext() if self.running else accumulate(*models):  # the pass has no gradients to synchronise
                yield

        def prepare_and_watch(*args: Any, **kwargs: Any) -> Any:
            loader = prepare_data_loader(*args, **kwargs)
            self._watch_loader(loader)
            return loader

        self._scope.enter_context(replaced(accelerator, "prepare_model", prepare_and_add))
        self._scope.enter_context(replaced(accelerator, "prepare_data_loader", prepare_and_watch))
        self._scope.enter_context(replaced(accelerator, "backward", watch_backward))
        self._scope.enter_context(replaced(accelerator, "accumulate", watch_accumulate))
        for model in _held(accelerator, "_models"):
            self.add_model(model, model)
        for loader in _held(accelerator, "_dataloaders"):
            self._watch_loader(loader)

    def _watch_loader(self, loader: Any) -> None:
        if hasattr(type(loader), "__iter__") and self.stage == "waiting":
            rewinding(loader, self)
            self._scope.callback(plain, loader)

    def _takes(self, loss: Tensor) -> bool:
        """Whether this loss is the pass's, and not to be trained on."""
        if self.stage == "waiting":
            if not self._inner:
                raise ValueError(f"a loss reached accelerator.backward, but {_NO_MODEL}")
            self._step_begins()  # the model was called before it was watched: this loss counts for nothing
            return self.running
        if self.stage == "collecting":
            assert self._pass is not None
            self.num_losses += 1
            try:
                self._pass.give(loss)
            except BaseException:
                self.stop()
                raise
            if self._pass.finished:
                self.stage = "solved"  # the step of the loop is not over yet
                self._finish(self._pass.result())
            return True
        return self.stage == "solved"  # a further loss of the step that gave the last one

    # The pass

    def _step_begins(self) -> None:
        if self.stage == "solved":
            self._release()
        elif self.stage == "waiting" and self._inner:
            self._begin()

    def _begin(self) -> None:
        """The first step of the loop: the pass starts, or nothing is left to do."""
        if self._init_from is not None:
            self._start_from_file(self._init_from)
            return
        if are_trained(self.modules, self._adapter_name):
            self._over("the adapters come trained: they go on as they are, and are not initialised anew")
            return
        modules = self.modules
        self.asked_ranks = {
            f"{component}.{name}": int(layer.r[self._adapter_name])
            for component, module in modules.items()
            for name, layer in adapters.lora_layers(module, self._adapter_name).items()
        }
        parameters = [
            p for module in modules.values() for p in adapters.trainable_parameters(module, self._adapter_name)
        ]
        self._check_wrapped(parameters)
        if self.method.observes == "nothing":
            self._finish(self._initialize(lambda: torch.zeros(())))
            self._over(self.outcome)
            return
        self._pass_scope.enter_context(standing_still(self.accelerator, self._models, parameters))
        self.stage = "collecting"
        self._pass = Handoff(self._initialize)
        try:
            self._pass.start()
        except BaseException:
            self.stop()
            raise

    def _check_wrapped(self, parameters: list[nn.Parameter]) -> None:
        """Data parallelism holds the parameters by shape and dtype, which must be what the initialisation sets."""
        if not any(hasattr(model, "require_backward_grad_sync") for model in self._models):
            return
        if self.on_solved is None and self._options.get("variable_rank"):  # a run that ends with the pass may
            raise ValueError(
                "variable ranks change the shapes of parameters that data parallelism has already wrapped: collect in "
                "a run of one process, write its init file, and start from that"
            )
        if any(parameter.dtype != torch.float32 for parameter in parameters):
            raise ValueError(
                "the adapters are not in float32, and data parallelism has already wrapped them: call "
                "diffusers.training_utils.cast_training_params(model) or attach before accelerator.prepare"
            )

    def _initialize(self, take: Callable[[], Tensor]) -> InitReport:
        return initialize(
            self.modules,
            self.method,
            range(self._init_batches),
            lambda _batch: take(),
            num_batches=self._init_batches,
            allow_unreached=True,
            adapter_name=self._adapter_name,
            **self._options,
        )

    def _finish(self, report: InitReport) -> None:
        self.report = report
        agree(self.modules, self._adapter_name)
        losses = f"{self.num_losses} losses of the loop" if self.num_losses else "no losses"
        parts = ", ".join(
            f"{len(adapters.lora_layers(module, self._adapter_name))} layers of {component}"
            for component, module in self.modules.items()
        )
        self.outcome = f"{report.method} from {losses}: {parts}"
        if self.num_losses and not self._accumulates:
            warnings.warn(
                f"the loop does not use accelerator.accumulate: if it counts its steps without asking "
                f"accelerator.sync_gradients, it has counted the {self.num_losses} losses of the collection pass, and "
                "trains for so many steps less",
                stacklevel=2,
            )
        self.say(self.outcome)
        if self.accelerator.is_main_process:
            print(report.summary(), flush=True)
            if self._output_dir is not None:
                report.save(self._output_dir / REPORT_NAME)
                write_text(self._output_dir / SUMMARY_NAME, f"{self.outcome}\n{report.summary()}\n")
        if self.on_solved is not None:
            self.on_solved(self)

    def _release(self) -> None:
        """The step of the last loss is over: the loop has its optimiser, its batches and its random numbers again."""
        self._pass_scope.close()
        if self._random is not None:
            self._random.restore()
        self._over(self.outcome)

    def _over(self, outcome: str) -> None:
        self.stage = "over"
        if outcome != self.outcome:
            self.say(outcome)
        self.outcome = outcome
        self._scope.close()

    def stop(self) -> None:
        """End a pass that has not ended, and take everything back but what checkpoints need."""
        if self._pass is not None:
            self._pass.cancel()
        self._pass_scope.close()
        self._scope.close()
        self.stage = "over"

    def close(self) -> None:
        """Leave the accelerator and diffusers as they were."""
        self.stop()
        self._checkpoints.stop()
        self.files.stop()

    # Files

    def _known(self) -> dict[str, nn.Module]:
        """What `WrittenFiles` sees to: nothing before the adapters are set."""
        return self.modules if self.stage in ("solved", "over") else {}

    def init_file(self) -> InitFile:
        """The initialisation as a file would have it, right after the pass."""
        assert self.report is not None
        settings = {"init_batches": self._init_batches, "num_processes": self.accelerator.num_processes}
        settings |= {"adapter_name": self._adapter_name, **self._options}
        return init_of(
            self.modules,
            self.report,
            asked_ranks=self.asked_ranks,
            settings=settings,
            data=data_key(_held(self.accelerator, "_dataloaders")),
            adapter_name=self._adapter_name,
        )

    def _start_from_file(self, init: InitFile) -> None:
        """The adapters were set when the models were prepared, or are now."""
        modules = self.modules
        missing = [component for component in init.components if component not in modules]
        if missing:
            raise ValueError(
                f"the init file holds {', '.join(init.components)}, and this loop prepares {', '.join(modules)}: "
                f"train {missing[0]} here, too, or make the file without it"
            )
        for component, module in modules.items():
            if not self._holds(init, component, module):
                if len(self._models) and self.accelerator.num_processes > 1:
                    raise ValueError(
                        "with several processes an init file is read before the models are prepared: start the script "
                        "with the launcher, or call apply_init before prepare"
                    )
                apply_init(init, {component: module}, self._adapter_name)
        difference = data_difference(init, data_key(_held(self.accelerator, "_dataloaders")))
        if difference is not None:
            warnings.warn(f"{difference}; its factors are used all the same", stacklevel=2)
        self._over(f"{init.method} from the init file, {len(init.ranks)} layers of {', '.join(modules)}")
        if self._output_dir is not None and self.accelerator.is_main_process:
            write_text(self._output_dir / SUMMARY_NAME, f"{self.outcome}\n")

    def _holds(self, init: InitFile, component: str, module: nn.Module) -> bool:
        state = adapters.adapter_state_dict({component: module}, self._adapter_name)
        own = {key: value for key, value in init.state.items() if key.startswith(f"{component}.")}
        return all(key in state and torch.equal(state[key].to(value.dtype), value) for key, value in own.items())

    def _loaded(self, checkpoint: Path | None) -> None:
        """A checkpoint has been loaded: what it holds is never initialised anew."""
        if self.stage == "waiting" and self._inner:
            if checkpoint is not None:
                self._over(f"resumed from {checkpoint}, with its initial factors")
            elif are_trained(self.modules, self._adapter_name):
                self._over("resumed from a checkpoint without initial factors: it goes on as an ordinary LoRA")

    def say(self, line: str) -> None:
        """Print a line, on the main process."""
        if self.accelerator.is_main_process:
            print(f"lorainit: {line}", flush=True)

    def missing(self) -> str | None:
        """Why nothing has been initialised when the loop is over; `None` where all is well."""
        if self.stage == "over":
            return None if self.outcome else "the collection pass has failed"
        if not self._inner:
            return _NO_MODEL
        if self.stage == "waiting":
            return "no adapted model computed a loss: the loop made no step"
        return (
            f"only {self.num_losses} of {self._init_batches} losses reached accelerator.backward; "
            "collect fewer, or let the script make a step"
        )


def _held(accelerator: Accelerator, name: str) -> Any:
    """What an accelerator has prepared or registered, for which it has no public name."""
    return getattr(accelerator, name)


assert set(OPTIONS) <= set(inspect.signature(initialize).parameters)
