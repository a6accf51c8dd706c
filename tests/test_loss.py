"""Promise: what lies out of frame leaves the loss, and nothing else does."""

import torch

from segcn.train.loss import diffusion_loss, valid_cells


def test_the_loss_is_the_mean_over_cells_in_frame():
    prediction, target = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    valid = torch.zeros(2, 8, 8, dtype=torch.bool)
    valid[0, :3] = True
    expected = (prediction[0, :, :3] - target[0, :, :3]).square().mean()
    loss = diffusion_loss(prediction, target, valid)
    assert torch.allclose(loss[0], expected) and loss[1] == 0


def test_cells_out_of_frame_cannot_move_the_loss():
    prediction, target = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    valid = torch.rand(1, 8, 8) > 0.5
    other = torch.where(valid[:, None], prediction, 1e6)
    assert torch.equal(diffusion_loss(prediction, target, valid), diffusion_loss(other, target, valid))


def test_a_cell_counts_only_if_all_its_pixels_are_in_frame():
    valid = torch.ones(1, 16, 16, dtype=torch.bool)
    valid[0, 7, 8] = False
    assert valid_cells(valid, 8).tolist() == [[[True, False], [True, True]]]
