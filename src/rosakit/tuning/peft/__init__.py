"""rosakit as a method of peft: `get_peft_model`, `PeftModel.from_pretrained`, several adapters.

Importing this package (or `rosakit.RosaPeftConfig`) makes the method known to peft; files that were
saved with it load after that import only.
"""

from rosakit.tuning.peft.config import RosaPeftConfig
from rosakit.tuning.peft.model import RosaModel
from rosakit.tuning.peft.registration import register

__all__ = ["RosaModel", "RosaPeftConfig"]

register(RosaPeftConfig, RosaModel)
