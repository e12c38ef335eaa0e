"""Shampoo (arXiv 1802.09568) on reflora.linalg.inv_root: all preconditioners of one size in one call per step.

python examples/shampoo_inverse_root.py
"""

import torch

from reflora import linalg


class Shampoo(torch.optim.Optimizer):
    """`W <- W - lr L^(-1/4) G R^(-1/4)` with `L <- L + G G^T`, `R <- R + G^T G`, for matrices W."""

    def __init__(self, params, lr=0.3, eps=1e-6):
        super().__init__(params, {"lr": lr, "eps": eps})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            sides = []
            for p in group["params"]:
                grams = self.state[p].setdefault("grams", [torch.zeros(n, n).to(p) for n in p.shape])
                grams[0].addmm_(p.grad, p.grad.mT), grams[1].addmm_(p.grad.mT, p.grad)
                sides += grams
            roots = [torch.empty_like(gram) for gram in sides]
            for n in {len(gram) for gram in sides}:
                same = [i for i, gram in enumerate(sides) if len(gram) == n]
                found = linalg.inv_root(torch.stack([sides[i] for i in same]), 4, eps=group["eps"])
                torch._foreach_copy_([roots[i] for i in same], list(found))
            for p, left, right in zip(group["params"], roots[::2], roots[1::2]):
                p.sub_(left @ p.grad @ right, alpha=group["lr"])


def train(make, steps=200):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(32, 64, bias=False), torch.nn.Tanh(), torch.nn.Linear(64, 16, bias=False)]
    model, x = torch.nn.Sequential(*layers), torch.randn(512, 32) * torch.logspace(0, -2, 32)
    y = torch.sin(x @ torch.randn(32, 16) * 3)
    optimizer = make(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
    return loss.item()


if __name__ == "__main__":
    print("Shampoo on reflora.linalg.inv_root, against SGD", flush=True)
    for name, make in (("SGD", lambda p: torch.optim.SGD(p, lr=5.0)), ("Shampoo", lambda p: Shampoo(p, lr=0.3))):
        print(f"{name}: loss {train(make):.4f} after 200 steps")
