"""lorabench: compose a LoRA experiment from configs, sweep it over one shared frozen base."""

__version__ = "0.2.0"
