"""A model in little, which engines run once to warm up."""

from __future__ import annotations

from loaders.network.spec import PLE, AltUp, Attention, Gated, Laurel, Layer, Model, Rope


def toy() -> Model:
    """A model with every mechanism once, small enough that warming up takes less than any model will."""
    rope = Rope(10_000.0, 32)
    norms = ("attn_in", "attn_out", "ffn_in", "ffn_out")

    def layer(window: int | None, kv_from: int | None) -> Layer:
        attention = Attention(4, 2, 32, 1.0, rope, window, "head", True, kv_from)
        return Layer(attention, Gated(256, "gelu_tanh", 0.5), norms)

    layers = (layer(8, None), layer(None, None), layer(8, 0))
    return Model("toy", 1024, 128, layers, 1e-6, True, 64, 16.0, 30.0, PLE(64, 16), AltUp(4, 0, True), Laurel(8))
