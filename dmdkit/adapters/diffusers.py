"""Networks and schedulers of diffusers, seen as dmdkit sees them: import from here."""

from dmdkit.adapters.conditions import EmptyPrompt as EmptyPrompt
from dmdkit.adapters.conditions import TextCondition as TextCondition
from dmdkit.adapters.conditions import TextMaskCondition as TextMaskCondition
from dmdkit.adapters.conditions import TextPooledCondition as TextPooledCondition
from dmdkit.adapters.conditions import sdxl_time_ids as sdxl_time_ids
from dmdkit.adapters.conditions import zero_text as zero_text
from dmdkit.adapters.diffusion_transformers import DiTNetwork as DiTNetwork
from dmdkit.adapters.diffusion_transformers import FluxNetwork as FluxNetwork
from dmdkit.adapters.diffusion_transformers import PixArtNetwork as PixArtNetwork
from dmdkit.adapters.diffusion_transformers import SD3Network as SD3Network
from dmdkit.adapters.schedulers import (
    parameterization_from_scheduler as parameterization_from_scheduler,
)
from dmdkit.adapters.schedulers import process_from_scheduler as process_from_scheduler
from dmdkit.adapters.transformer_networks import (
    TransformerNetwork as TransformerNetwork,
)
from dmdkit.adapters.unets import FeaturePlace as FeaturePlace
from dmdkit.adapters.unets import UNetNetwork as UNetNetwork
