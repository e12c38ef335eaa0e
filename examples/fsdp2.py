"""accelerate with FSDP2: base, adapter, gradients and moments are sharded over the processes; all have the same S.

pip install "reflora[peft,transformers]"
torchrun --standalone --nproc_per_node 2 examples/fsdp2.py [STEPS] [FOLDER]

It uses nccl on GPUs, else gloo. Run on two CPU processes; not yet on GPUs.
"""

import inspect
import itertools
import os
import sys
import warnings
from pathlib import Path

if os.environ.get("RANK", "0") == "0":
    print("RefLoRA trains a small Llama, sharded by FSDP2", flush=True)
# peft imports these where they are installed and calls what transformers has renamed: their warnings would come first
sys.modules.update(dict.fromkeys(("torchao", "bitsandbytes", "deepspeed")))
warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType, set_seed
from peft import LoraConfig, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from reflora import create_reflora_optimizer

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 100
FOLDER = sys.argv[2] if len(sys.argv) > 2 else "llama-fsdp2"

plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
accelerator = Accelerator(fsdp_plugin=plugin, cpu=not torch.cuda.is_available())
if accelerator.device.type == "cpu":
    # accelerate uses FSDP on accelerators only; on CPUs it would silently take DDP
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
set_seed(0)

# a small Llama with random weights reads Python, byte by byte; for a real one use AutoModelForCausalLM.from_pretrained
sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
base = LlamaForCausalLM(LlamaConfig(vocab_size=256, initializer_range=0.1, **sizes))
model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=8, target_modules="all-linear"))
windows = torch.tensor(list(Path(inspect.__file__).read_bytes())).unfold(0, 128, 128)
train = DataLoader(windows[torch.arange(len(windows)) % 10 > 0], batch_size=8, shuffle=True, drop_last=True)
held_out = DataLoader(windows[:960:10], batch_size=8)

# after the Accelerator, which says that the model will be sharded, and before prepare(), which shards it
optimizer = create_reflora_optimizer(model, lr=1e-2)
model, optimizer, train, held_out = accelerator.prepare(model, optimizer, train, held_out)


@torch.no_grad()
def evaluate():
    model.eval()
    losses = torch.stack([model(input_ids=batch, labels=batch).loss for batch in held_out])
    model.train()
    return accelerator.reduce(losses.mean(), "mean").item()


before = evaluate()
epochs = itertools.chain.from_iterable(itertools.repeat(train))
for batch in itertools.islice(epochs, STEPS):
    accelerator.backward(model(input_ids=batch, labels=batch).loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
after = evaluate()
factors = [p for p in model.parameters() if p.requires_grad]
held = sum(p.to_local().numel() for p in factors)
accelerator.print(f"each process holds {held} of {sum(p.numel() for p in factors)} trainable parameters")
accelerator.print(f"held-out loss: {before:.3f} before, {after:.3f} after {STEPS} steps")
accelerator.print(optimizer.optimizer.diagnostics())

# all processes gather the adapter, the first one writes it; frozen weights stay sharded
options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
adapter = get_model_state_dict(model, options=options)
if accelerator.is_main_process:
    model.save_pretrained(FOLDER, state_dict=adapter)
accelerator.end_training()
