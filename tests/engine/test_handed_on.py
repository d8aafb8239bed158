"""What a stage has sent takes no memory until its backward pass, and the gradients are the same."""

import weakref

import pytest
import torch

from lab_utils.engine.handed_on import SENDS, empty, let_go
from lab_utils.models.deepseek_v4.pipeline import _HandOn


def handed_on(seed: int, shares: int):
    """A stage's output with losses tied to it, its inputs, and a weak reference to the last layer's memory."""
    torch.manual_seed(seed)
    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(shares, requires_grad=True)
    h = (x * 2).sin().view(3, 2, 4)  # a view, as a layer's output is
    memory = weakref.ref(h.untyped_storage())
    out = _HandOn.apply(h, *(each.exp() for each in w))
    return out, x, w, memory


@pytest.mark.parametrize("shares", [0, 1, 3])
def test_an_emptied_output_holds_no_memory_and_gives_the_same_gradients(shares):
    grad = torch.randn(3, 2, 4)
    kept, x_kept, w_kept, memory = handed_on(1, shares)
    assert memory() is not None
    kept.backward(grad)
    out, x, w, memory = handed_on(1, shares)
    assert torch.equal(out, kept)
    empty(out)
    assert (
        memory() is None and out.untyped_storage().nbytes() == out.element_size() and out.shape == grad.shape
    )
    out.backward(grad)
    assert torch.equal(x.grad, x_kept.grad)
    assert shares == 0 or (torch.equal(w.grad, w_kept.grad) and torch.allclose(w.grad, w.detach().exp()))


class Sends:
    """A stand-in for a schedule: it tells what it was given, as ColossalAI's two give it."""

    def __init__(self):
        self.sent = []
        let_go(self)

    def send_forward(self, *args, send_first=None):
        self.sent.append(args[-1]["streams"].sum().item() if isinstance(args[-1], dict) else None)
        return "handles"

    def send_forward_recv_forward(
        self, model_chunk_id_send, model_chunk_id_recv, output_tensor, send_first=True
    ):
        self.sent.append(output_tensor["streams"].sum().item())
        return "input", []


def test_outputs_are_emptied_after_they_are_sent_however_they_are_given():
    schedule = Sends()
    assert set(SENDS) - set(vars(schedule)) == {"send_forward_recv_backward"}
    one, two, three = ({"streams": torch.ones(2, 3)} for _ in range(3))
    assert schedule.send_forward(one) == "handles" and schedule.send_forward(0, two) == "handles"
    assert schedule.send_forward_recv_forward(0, 1, output_tensor=three, send_first=False) == ("input", [])
    assert schedule.sent == [6.0, 6.0, 6.0]
    assert all(each["streams"].untyped_storage().nbytes() == 4 for each in (one, two, three))


def test_a_loss_that_goes_nowhere_is_left_alone():
    loss = torch.ones(())
    Sends().send_forward(0, loss)
    assert loss == 1.0
