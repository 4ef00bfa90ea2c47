"""TRAINING: pretrain, sft, dpo, grpo, in Transformers' and TRL's trainers.

What is set here must be set before torch and tqdm are imported.
"""

import os
import sys
import warnings

# A log has lines, no bars: those of our libraries are drawn on terminals only
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_DISABLE", "1")
# transformers 5.23 renames its own field names, which TRL 1.16 still uses
warnings.filterwarnings("ignore", message=r".*gradient_checkpointing.*deprecated", category=FutureWarning)
