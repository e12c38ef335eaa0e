"""QLoRA: an adapter on a 4-bit base (NF4, double quantisation), with gradient checkpointing, in a Trainer.

pip install "reflora[peft,transformers]" bitsandbytes
python examples/qlora.py [STEPS] [FOLDER] [MODEL]   # MODEL: a causal model's folder or id; default: a small random one
"""

import inspect
import logging
import sys
import warnings
from pathlib import Path

print("RefLoRA trains an adapter on a 4-bit base, in a Trainer", flush=True)
# peft imports these where they are installed and calls what transformers has renamed: their warnings would come first
sys.modules.update(dict.fromkeys(("torchao", "deepspeed", "kernels")))
warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # it does without a kernel of the hub

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    ByT5Tokenizer,
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from reflora import create_reflora_optimizer

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 60
FOLDER = Path(sys.argv[2] if len(sys.argv) > 2 else "qlora-python")
MODEL = sys.argv[3] if len(sys.argv) > 3 else FOLDER / "base"
bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
lr = 2e-4

set_seed(0)
if MODEL == FOLDER / "base":
    lr = 1e-2  # random weights have further to go
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=384, initializer_range=0.1, **sizes)).save_pretrained(MODEL)
    ByT5Tokenizer().save_pretrained(MODEL)  # bytes: no file to download

quantization = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
)
base = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=quantization)
print(f"base: {base.get_memory_footprint() / 2**20:.2f} MiB, in 16 bits {base.num_parameters() / 2**19:.2f} MiB")
for module in base.modules():
    # on CPUs with AVX512-BF16 bitsandbytes 0.50 packs 4-bit weights at the first evaluation: no gradient passes then
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
# norms and embeddings in float32, and gradient checkpointing on
base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=8, target_modules="all-linear"))
optimizer = create_reflora_optimizer(model, lr=lr)

# the text: a module of the standard library
tokenizer = AutoTokenizer.from_pretrained(MODEL)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
tokens = tokenizer(Path(inspect.__file__).read_text())["input_ids"]
rows = [{"input_ids": tokens[start : start + 128]} for start in range(0, len(tokens) - 127, 128)]
trainer = Trainer(
    model,
    TrainingArguments(
        FOLDER,
        max_steps=STEPS,
        per_device_train_batch_size=8,
        bf16=bf16,
        logging_steps=20,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    ),
    train_dataset=[row for i, row in enumerate(rows) if i % 10],
    eval_dataset=rows[::10],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    optimizers=(optimizer, None),
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
print(f"held-out loss: {before:.3f} before, {trainer.evaluate()['eval_loss']:.3f} after {STEPS} steps")
print(optimizer.diagnostics())
model.save_pretrained(FOLDER)
