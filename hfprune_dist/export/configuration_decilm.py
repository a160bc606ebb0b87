"""NVIDIA's DeciLM (nemotron-nas), a Llama whose layers differ in width, for vLLM, which has the model, not this."""

from typing import Any

from transformers import LlamaConfig


class Settings(dict[str, Any]):
    """A JSON object whose fields are attributes too, as vLLM reads them: ``block_configs[0].ffn.intermediate_size``."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


class DeciLMConfig(LlamaConfig):  # type: ignore[misc]
    """A Llama's configuration with ``block_configs``: for each layer, the settings of its attention and its MLP."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: Any = (), **settings: Any) -> None:
        super().__init__(**settings)
        self.block_configs = [Settings({part: Settings(own) for part, own in block.items()}) for block in block_configs]
