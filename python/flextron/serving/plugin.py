"""What vLLM loads by the entry point ``vllm.general_plugins``, in each of its processes.

An elastic checkpoint is a directory of its parent's architecture, and stays one. So vLLM's own parser of configurations
is extended: where ``flextron.json`` lies beside ``config.json``, the architecture is ours.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.transformers_utils.config import get_config_parser, register_config_parser
from vllm.transformers_utils.repo_utils import file_or_path_exists

from flextron.checkpoint import ELASTIC_FILE
from flextron.checkpoint.hub import local
from flextron.serving.budgets import FIELDS, Offer
from flextron.serving.served import serve

ARCHITECTURE = "FlextronForCausalLM"
PREFIX = "flextron_"  # of the server's budget among --hf-overrides
MACHINE = "_flextron_machine"  # in the configuration: found once, by the process that vLLM starts first
_MODEL = "flextron.serving.vllm_model:ElasticForCausalLM"
_PROCESSOR = "flextron.serving.vllm_requests:BudgetOfRequests"

logger = init_logger("vllm.flextron")


def register() -> None:
    """Make ``vllm serve DIR`` take elastic checkpoints."""
    ModelRegistry.register_model(ARCHITECTURE, _MODEL)
    MODELS_CONFIG_MAP[ARCHITECTURE] = ElasticServing
    stock = type(get_config_parser("hf"))
    if not hasattr(stock, "flextron"):
        register_config_parser("hf")(_parser_of(stock))


def _parser_of(stock: Any) -> Any:
    class ElasticParser(stock):
        """vLLM's parser, which names our architecture for an elastic checkpoint."""

        flextron = True

        def parse(
            self, model: Any, trust_remote_code: bool, revision: str | None = None, *args: Any, **kwargs: Any
        ):
            found, config = super().parse(model, trust_remote_code, revision, *args, **kwargs)
            if file_or_path_exists(model, ELASTIC_FILE, revision=revision):
                config.architectures = found["architectures"] = [ARCHITECTURE]
            return found, config

    return ElasticParser


class ElasticServing(VerifyAndUpdateConfig):
    """What vLLM's configuration must be where it runs an elastic checkpoint."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Raises ValueError where an option is set that the model does not know."""
        model = vllm_config.model_config
        parallel = vllm_config.parallel_config
        for what, value, must in (
            ("--tensor-parallel-size", parallel.tensor_parallel_size, 1),
            ("--pipeline-parallel-size", parallel.pipeline_parallel_size, 1),
            ("--quantization", model.quantization, None),
            ("--speculative-config", vllm_config.speculative_config, None),
            ("--enable-lora", vllm_config.lora_config, None),
        ):
            if value != must:
                raise ValueError(f"flextron: {what} must be {must} with an elastic checkpoint, got {value}")
        offer = offer_of(vllm_config)
        serve(offer)
        # the older runner calls a processor with every change of the batch before the forward that it is for
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        model.logits_processors = [*(model.logits_processors or []), _PROCESSOR]
        model.enforce_eager = (
            True  # widths change between forwards, and a captured graph would keep the first
        )
        if not offer.own and vllm_config.cache_config.enable_prefix_caching:
            logger.info("flextron: requests of different budgets share no prefix: prefix caching is off")
            vllm_config.cache_config.enable_prefix_caching = False


def directory_of(vllm_config: VllmConfig) -> Path:
    """The folder of the checkpoint."""
    model = vllm_config.model_config
    return Path(local(model.model, revision=model.revision))


def offer_of(vllm_config: VllmConfig) -> Offer:
    """What this server offers; the machine is the one that its first process found."""
    model, config = vllm_config.model_config, vllm_config.model_config.hf_config
    own = {name: getattr(config, PREFIX + name, None) for name in FIELDS}
    device = torch.device(vllm_config.device_config.device_type)
    machine = getattr(config, MACHINE, None)
    offer = Offer.read(directory_of(vllm_config), own, model.dtype, device, machine)
    setattr(config, MACHINE, offer.planner.machine)
    return offer
