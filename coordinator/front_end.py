"""vLLM's front half without an engine: model configuration, tokenizer, input and output processing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm import envs
from vllm.config import ModelConfig, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.renderers import BaseRenderer, renderer_from_config
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontEndConfig:
    model: str
    """A local folder or a hub id."""
    served_model_name: str
    """The name that clients use; workers register under the same."""
    max_model_len_tokens: int | None = None
    """Longest prompt plus completion; the model's own limit when None. Smaller limits of workers prevail."""
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's AsyncEngineArgs, for example tokenizer or trust_remote_code."""


@dataclass(slots=True, kw_only=True)
class FrontEnd:
    """Belongs to one event loop; `close()` ends the renderer's threads."""

    vllm_config: VllmConfig
    renderer: BaseRenderer
    input_processor: InputProcessor
    output_processor: OutputProcessor
    served_model_name: str
    own_max_model_len_tokens: int

    @property
    def model_config(self) -> ModelConfig:
        return self.vllm_config.model_config

    def limit_model_len(self, max_model_len_tokens: int | None) -> None:
        """Accept no more than workers can hold; None lifts that limit again.

        Everything in vLLM's front end reads the limit from the model configuration for each request,
        but for the two tokenizing defaults, which the renderer caches.
        """
        limit = min(self.own_max_model_len_tokens, max_model_len_tokens or self.own_max_model_len_tokens)
        if limit != self.model_config.max_model_len:
            self.model_config.max_model_len = limit
            for cached in ("default_cmpl_tok_params", "default_chat_tok_params"):
                self.renderer.__dict__.pop(cached, None)

    def close(self) -> None:
        self.renderer.shutdown()


def build_front_end(config: FrontEndConfig) -> FrontEnd:
    """Read configuration and tokenizer of the model; touches no weights and needs no accelerator.

    Takes seconds. Raises what vLLM raises for a model that cannot be found or is not supported.
    """
    engine_args = AsyncEngineArgs(
        model=config.model,
        served_model_name=[config.served_model_name],
        max_model_len=config.max_model_len_tokens,
        **config.engine_args,
    )
    model_config = engine_args.create_model_config()
    # Quantised weights are the workers' business; here their kernels would be looked for in vain.
    model_config.quantization = None
    # No KV cache is made here: silences a warning of the CPU platform about its size.
    envs.VLLM_CPU_KVCACHE_SPACE = 0
    vllm_config = VllmConfig(
        model_config=model_config,
        structured_outputs_config=engine_args.create_structured_outputs_config(),
    )
    renderer = renderer_from_config(vllm_config)
    return FrontEnd(
        vllm_config=vllm_config,
        renderer=renderer,
        input_processor=InputProcessor(vllm_config, renderer),
        output_processor=OutputProcessor(renderer.tokenizer, log_stats=False),
        served_model_name=config.served_model_name,
        own_max_model_len_tokens=model_config.max_model_len,
    )
