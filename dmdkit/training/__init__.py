"""Training: whose turn it is, what is trainable, averages, checkpoints, health."""

from dmdkit.training.background import BackgroundCheckpoints as BackgroundCheckpoints
from dmdkit.training.checkpoint import Resumed as Resumed
from dmdkit.training.checkpoint import load_checkpoint as load_checkpoint
from dmdkit.training.checkpoint import load_newest_checkpoint as load_newest_checkpoint
from dmdkit.training.checkpoint import save_checkpoint as save_checkpoint
from dmdkit.training.checkpoint_files import (
    DamagedCheckpointError as DamagedCheckpointError,
)
from dmdkit.training.checkpoint_files import checkpoints as checkpoints
from dmdkit.training.checkpoint_files import keep_checkpoint as keep_checkpoint
from dmdkit.training.checkpoint_files import verify_checkpoint as verify_checkpoint
from dmdkit.training.checkpoint_state import Stateful as Stateful
from dmdkit.training.ema import ExponentialMovingAverage as ExponentialMovingAverage
from dmdkit.training.modules import frozen as frozen
from dmdkit.training.modules import trainable_copy as trainable_copy
from dmdkit.training.monitor import Monitor as Monitor
from dmdkit.training.monitor import NonFiniteError as NonFiniteError
from dmdkit.training.monitor import all_finite as all_finite
from dmdkit.training.monitor import explain_nonfinite as explain_nonfinite
from dmdkit.training.monitor import image_statistics as image_statistics
from dmdkit.training.ranks import GeneratorState as GeneratorState
from dmdkit.training.ttur import TTURCounts as TTURCounts
from dmdkit.training.ttur import TTURScheduler as TTURScheduler
from dmdkit.training.warmup import linear_warmup as linear_warmup
from dmdkit.training.weights import load_modules as load_modules
from dmdkit.training.weights import load_states as load_states
from dmdkit.training.weights import saved_parameters as saved_parameters
