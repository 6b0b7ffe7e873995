"""Adapters of Hugging Face's PEFT, both ways: files, or dictionaries in memory. PEFT itself is not needed.

    save_peft(model, "adapter")  # of a model patched with method "lora" or "dora": PeftModel.from_pretrained loads it
    load_peft(model, "adapter")  # what PeftModel.save_pretrained wrote: the model is patched

See docs/peft.md for what converts and what cannot.
"""

from .reader import from_peft_state_dict, load_peft
from .writer import save_peft, to_peft_config, to_peft_state_dict

__all__ = ["from_peft_state_dict", "load_peft", "save_peft", "to_peft_config", "to_peft_state_dict"]
