"""What training reads instead of running the VAE, the text encoders and the reference.

Each cache is a folder of shards (`mmalign.data.cache`) below `diffusion.cache_folder`. An entry's
key holds everything that decides its values, so a changed picture, model or setting is a miss and
never a wrong number. `mmalign cache CONFIG` writes them.
"""

from mmalign.diffusion.error_bank import ErrorBank
from mmalign.diffusion.latent_cache import LatentCache, has_latents
from mmalign.diffusion.notes import cache_folder
from mmalign.diffusion.prompt_cache import PromptCache

__all__ = ["ErrorBank", "LatentCache", "PromptCache", "cache_folder", "has_latents"]
