"""The quick checks at the start of every training, as far as they are not made elsewhere."""

from dwrl_fast.config import TrainConfig
from dwrl_fast.doctor.finding import worst
from dwrl_fast.doctor.machine import memory
from dwrl_fast.doctor.tokens import bos, padding
from dwrl_fast.doctor.weights import finite, generation_config
from dwrl_fast.errors import ConfigError, NotFiniteError, TemplateError, UserError
from dwrl_fast.log import logger
from dwrl_fast.methods import Method
from dwrl_fast.scoring import Runtime

ERRORS: dict[str, type[UserError]] = {"BOS": TemplateError, "weights": NotFiniteError, "memory": ConfigError}


def check_start(config: TrainConfig, method: Method, runtime: Runtime, longest: int) -> None:
    """Log warnings, and raise failures as TemplateError, NotFiniteError or ConfigError. Chat template, labels, layouts,
    the processor's bfloat16 and the operators' backends were checked earlier. All ranks call this together.
    """
    findings = [bos(method.dialog), padding(method.dialog, scalar=method.scalar), finite(runtime)]
    findings += [memory(runtime, method, config, longest)]
    findings += [] if method.scalar else [generation_config(runtime.model.lm)]
    for found in worst(findings, runtime.ranks):
        if found.status == "fail":
            raise ERRORS[found.name](f"{found.name}: {found.seen}. {found.remedy}")
        if found.status == "warn":
            logger.warning("%s: %s. %s", found.name, found.seen, found.remedy)
