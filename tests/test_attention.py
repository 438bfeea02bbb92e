"""Attention in training on CPUs: float32 inside autocast, with the gradients of the formula."""

import pytest
import torch
import torch.nn.functional as F

from train.attention import Float32Attention, training_attention

CPU = torch.device("cpu")


def formula(query, key, value, mask):
    """softmax(q k^T / sqrt(d) + mask) v in float64 (Vaswani et al. 2017, equation 1)."""
    scores = query.double() @ key.double().transpose(-1, -2) / query.shape[-1] ** 0.5
    return torch.softmax(scores + (0 if mask is None else mask.double()), dim=-1) @ value.double()


def tensors(kind=torch.bfloat16):
    random = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, 3, length, 16, generator=random).to(kind) for length in (9, 13, 13)]
    return [each.requires_grad_() for each in drawn], torch.randn(9, 13, generator=random).to(kind)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_values_and_gradients_are_those_of_the_formula(masked, named):
    (query, key, value), mask = tensors()
    mask = mask if masked else None
    with Float32Attention(), torch.autocast("cpu", torch.bfloat16):
        if named:
            found = F.scaled_dot_product_attention(query=query, key=key, value=value, attn_mask=mask)
        else:
            found = F.scaled_dot_product_attention(query, key, value, mask)
    assert found.dtype == torch.bfloat16
    exact = formula(query, key, value, mask)
    assert (found - exact).abs().max() <= 2**-8 * exact.abs().max()  # rounded once, at the end
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad((found.float() * weight).sum(), (query, key, value))
    wanted = torch.autograd.grad((exact * weight).sum(), (query, key, value))
    for one, other in zip(got, wanted, strict=True):
        assert (one.double() - other.double()).abs().max() <= 0.02 * other.abs().max()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_the_type_of_the_result_is_that_without_the_mode(given, autocast):
    (query, key, value), _ = tensors()
    query, key, value = query.detach().to(given).requires_grad_(), key.to(given), value.to(given)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain = F.scaled_dot_product_attention(query, key, value)
        with Float32Attention():
            found = F.scaled_dot_product_attention(query, key, value)
    assert found.dtype == plain.dtype


def test_without_a_gradient_nothing_is_converted():
    (query, key, value), _ = tensors()
    with torch.no_grad():
        plain = F.scaled_dot_product_attention(query, key, value)
    frozen = [each.detach() for each in (query, key, value)]
    with Float32Attention():
        assert torch.equal(F.scaled_dot_product_attention(*frozen), plain)


def test_only_where_it_is_faster():
    assert isinstance(training_attention(CPU, "bf16"), Float32Attention)
    assert not isinstance(training_attention(CPU, "fp32"), Float32Attention)
    assert not isinstance(training_attention(torch.device("cuda"), "bf16"), Float32Attention)


def test_a_compiled_network_has_it_too():
    """train.compile: traced within the mode, without it (held-out losses), and within it again."""
    (query, key, value), _ = tensors(torch.float32)
    plain = lambda *given: F.scaled_dot_product_attention(*given)  # noqa: E731
    code = torch.compile(plain, backend="aot_eager", fullgraph=True)

    def gradients(network, mode):
        with torch.autocast("cpu", torch.bfloat16), training_attention(CPU, "bf16" if mode else "fp32"):
            found = network(query, key, value)
        return found, *torch.autograd.grad(found.float().square().sum(), (query, key, value))

    assert not torch.equal(gradients(plain, True)[1], gradients(plain, False)[1])
    for mode in (True, False, True):
        for one, other in zip(gradients(code, mode), gradients(plain, mode), strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)
