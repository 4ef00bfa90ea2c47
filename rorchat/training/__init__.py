"""TRAINING: pretrain, sft, dpo, in Transformers' and TRL's trainers.

What is set here must be set before torch and bitsandbytes are imported.
"""

import logging
import os
import warnings

# Large pages for the tensors of a step, which torch frees and faults in again every time
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# bitsandbytes says at every import on a CPU that it has no 4-bit kernel, which nothing here asks for
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# transformers 5.23 renames its own field names, which TRL 1.16 still uses
warnings.filterwarnings("ignore", message=r".*gradient_checkpointing.*deprecated", category=FutureWarning)
