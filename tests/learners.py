"What the tests of several methods share: small data, and the digest of two training steps."
import pytest
import torch

from medsyn.data.lesions import draw_lesions, lesion_folder
from medsyn.data.pairs import find_pairs, pair_dls
from medsyn.diffusion.backbone import Backbone
from medsyn.train import fit_steps

def small_loaders(folder):
    "Twelve training pairs and four for validation at 16 px, in batches of six; the same batches each time."
    pairs = find_pairs(lesion_folder(folder, 16, size=16, seed=0))
    return pair_dls(pairs, size=16, bs=6, valid=0.25, seed=0, augment=False, device='cpu')

def small_backbone(prediction='v_prediction'):
    "An untrained backbone for them."
    images = torch.from_numpy(draw_lesions(8, 16, seed=1)[0]).permute(0, 3, 1, 2)/127.5 - 1
    return Backbone.tiny(images, 16, channels=(16, 32), prediction=prediction)

def check_two_steps(learn, losses, weights):
    "The losses of two training steps, term by term, and the sum of the trained weights' absolute values."
    frame = fit_steps(learn, 2).history.frame().drop(columns=['step', 'lr'])
    assert set(frame) == set(losses)
    for name, values in losses.items(): assert frame[name].tolist() == pytest.approx(values, abs=1e-6), name
    trained = [p.double().abs().sum() for p in learn.model.parameters() if p.requires_grad]
    assert sum(trained).item() == pytest.approx(weights, rel=1e-6)
