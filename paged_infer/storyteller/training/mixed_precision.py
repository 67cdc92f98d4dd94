"""Mixed-precision training (Micikevicius 2017): products in 16 bits, weights and optimizers in float32.

The float32 weights are the masters. ``autocast`` rounds them, and whatever else products read, to 16 bits for each
product, and its gradients come back in 16 bits. The optimizers add them to the masters, whose last bits keep small
updates that 16 bits would round away.

                exponent   fraction   smallest number > 0   largest
    float32     8 bits     23 bits    1.4e-45               3.4e38
    bfloat16    8 bits      7 bits    9.2e-41               3.4e38      the range of float32
    float16     5 bits     10 bits    6.0e-8                65,504

In float16, gradients below 3e-8 become 0: most of those of the logits, since a mean over thousands of tokens divides
each by their number. The loss is therefore multiplied by a large number, which multiplies every gradient; those of the
masters are divided by it in float32. bfloat16 gives up precision instead of range, so it needs no scale.
"""

import torch


def autocast(precision: torch.dtype) -> torch.autocast:
    """Products on the CPU in ``precision``: bfloat16, float16, or float32, which changes nothing.

    torch computes float16 on a CPU without AVX512-FP16 or AMX about 15 times slower than bfloat16: it is for learning.
    """
    return torch.autocast("cpu", precision, enabled=precision != torch.float32)


class LossScale:
    """A factor of the loss that is as large as the gradients allow. The rule and defaults of torch.amp.GradScaler.

    A step whose gradients overflow is skipped, and the factor halved. After ``interval`` steps in a row that did not,
    it is doubled.
    """

    def __init__(self, scale: float = 2.0**16, growth: float = 2.0, backoff: float = 0.5, interval: int = 2000) -> None:
        self.scale, self.growth, self.backoff, self.interval = scale, growth, backoff, interval
        self.good_steps = self.skipped_steps = 0  # good ones: since the last change

    @classmethod
    def of(cls, precision: torch.dtype) -> "LossScale":
        """The default in float16; elsewhere 1, for good."""
        return cls() if precision == torch.float16 else cls(1.0, growth=1.0)

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of ``loss`` times the scale."""
        (loss * self.scale).backward()

    def unscale(self, model: torch.nn.Module) -> bool:
        """Divide the gradients of ``model`` by the scale. False if they overflowed: this step must be skipped.

        Raises:
            FloatingPointError: they are not finite at a scale of 1, either.
        """
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):
            if self.scale <= 1:
                raise FloatingPointError(f"the gradients are infinite or NaN at a loss scale of {self.scale:g}")
            self.scale, self.good_steps, self.skipped_steps = self.scale * self.backoff, 0, self.skipped_steps + 1
            return False
        for gradient in gradients:
            gradient.div_(self.scale)
        self.good_steps += 1
        if self.good_steps == self.interval:
            self.scale, self.good_steps = self.scale * self.growth, 0
        return True
