"SegGuidedDiff on latents: limit cases, unlabelled images, and what training on rendered discs must show."
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from medsyn.core import MedsynError
from medsyn.data.pairs import PairDataset, find_pairs, pair_dls
from medsyn.diffusion.backbone import Backbone, random_stable_diffusion
from medsyn.diffusion.learner import UNKNOWN, Denoiser, DiffusionCB, denoising_learner
from medsyn.diffusion.sample import defaults_of, sample
from medsyn.generate.alignment import AlignmentGenerator
from medsyn.generate.catalog import METHODS, generator_learner, load_generator
from medsyn.generate.concat import (ConcatGenerator, WithUnlabelled, concat_learner, mask_channels,
                                    with_unlabelled)
from medsyn.generate.control import ControlGenerator
from medsyn.generate.siamese import SiameseGenerator
from medsyn.train import fit_steps

SIZE = 32

def disc_folder(path, n, seed):
    "Dark discs on light, noisy ground."
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE]/SIZE
    for i in range(n):
        cy, cx, radius = rng.uniform(.25, .75), rng.uniform(.25, .75), rng.uniform(.12, .25)
        mask = (y - cy)**2 + (x - cx)**2 < radius**2
        image = np.where(mask, .35, .75)[..., None]*np.array([1., .7, .6])
        image = image + .03*rng.standard_normal(image.shape)
        for folder, picture in dict(images=image, masks=mask).items():
            (path/folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray((np.clip(picture, 0, 1)*255).astype(np.uint8)).save(path/folder/f'{i:03}.png')
    return path

@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp('discs')
    return disc_folder(root/'labelled', 40, 0), disc_folder(root/'unlabelled', 24, 1)

@pytest.fixture(scope='module')
def held_out(folders):
    "Validation images in [-1,1] and their masks."
    images, masks = zip(*list(loaders(folders).valid))
    x0 = torch.cat([x.as_subclass(torch.Tensor) for x in images])*2 - 1
    return x0, torch.cat([m.as_subclass(torch.Tensor) for m in masks])[:, None].float()

@pytest.fixture(scope='module')
def backbone(held_out): return Backbone.tiny(held_out[0], SIZE, channels=(32, 64))

def loaders(folders, **kw):
    pairs = find_pairs(folders[0])
    return pair_dls(pairs, size=SIZE, bs=8, valid=.2, seed=0, augment='flip', device='cpu', **kw)

def files(folders): return [p.image for p in find_pairs(folders[1])]
def losses(learn, steps=3): return fit_steps(learn, steps).history.frame().loss.tolist()

def test_the_mask_keeps_every_pixel():
    mask = (torch.rand(3, 1, SIZE, SIZE) > .5).float()
    for stride in (4, 8):
        channels = mask_channels(mask, torch.tensor([1., 1., 0.]), stride)
        assert channels.shape == (3, stride**2 + 1, SIZE//stride, SIZE//stride)
        assert torch.equal(F.pixel_shuffle(channels[:2, :-1], stride), mask[:2])
        assert torch.equal(channels[:2, -1], torch.ones_like(channels[:2, -1])) and not channels[2].any()

@pytest.mark.parametrize('scale', ['tiny', 'stable diffusion'])
def test_step_0_is_the_backbone(scale, backbone, tmp_path):
    "Bit for bit, for every mask, with and without gradients."
    bb = backbone if scale == 'tiny' else Backbone.from_pretrained(random_stable_diffusion(tmp_path), size=64)
    gen, side = ConcatGenerator(bb), SIZE if scale == 'tiny' else 64
    n = side//bb.codec.stride
    zt, t = torch.randn(4, bb.codec.channels, n, n), torch.tensor([0, 300, 700, 999])
    cond = gen.condition((torch.rand(4, 1, side, side) > .5).float())
    for z in (zt, zt.contiguous(memory_format=torch.channels_last)):
        plain = Denoiser(bb)(z, t, cond)
        assert torch.equal(gen(z, t, cond), plain) and torch.equal(gen(z, t, cond.without_mask()), plain)
    gen(zt, t, cond).square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in gen.backbone.unet.conv_in.parameters())
    assert bb.unet.conv_in.weight.grad is None and bb.unet.conv_in.in_channels == bb.codec.channels

def test_drop_0_is_the_plain_loss(folders, backbone):
    plain = losses(denoising_learner(loaders(folders), ConcatGenerator(backbone)))
    zero = losses(concat_learner(loaders(folders), backbone, drop_mask=0.))
    start = losses(denoising_learner(loaders(folders), Denoiser(copy.deepcopy(backbone))), 1)
    assert zero == plain and zero[0] == start[0]
    assert losses(concat_learner(loaders(folders), backbone, drop_mask=.5))[1:] != zero[1:]

def test_no_unlabelled_images_change_nothing(folders, backbone):
    without = losses(concat_learner(loaders(folders), backbone))
    empty = losses(concat_learner(loaders(folders), backbone, unlabelled=[]))
    assert without == empty
    assert losses(concat_learner(loaders(folders), backbone, unlabelled=files(folders))) != without
    dls = loaders(folders)
    assert with_unlabelled(dls, []) is dls

def test_unlabelled_images(folders, backbone):
    dls = with_unlabelled(loaders(folders), folder_files := files(folders), share=.75)
    assert len(dls.train.dataset) == 3*32 + 24 and len(dls.valid.dataset) == 8
    masks = torch.stack([torch.as_tensor(dls.train.dataset[i][1]) for i in range(len(dls.train.dataset))])
    assert (masks[:96] <= 1).all() and (masks[96:] == UNKNOWN).all()
    learn = concat_learner(loaders(folders), backbone, unlabelled=folders[1]/'images', drop_mask=0.)
    assert learn.dls.train.dataset.unlabelled.pairs == folder_files
    batch = fit_steps(learn, 1).noised
    unknown = batch.cond.has_mask == 0
    assert 0 < unknown.sum() < 8
    assert not batch.mask[unknown].any() and batch.mask[~unknown].flatten(1).any(1).all()

def test_what_the_mask_can_guide(folders, backbone):
    "It must have been missing in training: dropped, or never there."
    for settings, guide in (({}, 'mask'), (dict(drop_mask=0.), 'prompt'),
                            (dict(drop_mask=0., unlabelled=files(folders)), 'mask')):
        assert defaults_of(concat_learner(loaders(folders), backbone, **settings).model)[1] == guide

def test_bad_unlabelled(folders, tmp_path):
    dls = loaders(folders)
    twin = tmp_path/'copied.bmp'
    Image.open(dls.pairs_valid[0].image).save(twin)
    with pytest.raises(MedsynError, match='are validation images'): with_unlabelled(dls, [twin])
    with pytest.raises(MedsynError, match='a share of 1.5'): with_unlabelled(dls, files(folders), 1.5)
    with pytest.raises(MedsynError, match='give a share between 0 and 1'): DiffusionCB(drop_mask=-1)

def test_unlabelled_images_are_read_like_the_pairs(folders, tmp_path):
    "Fit, window and page of `pair_dls` hold for them, in the comparison with the validation images too."
    wide, deep, stack = tmp_path/'wide.png', tmp_path/'deep.png', tmp_path/'stack.tif'
    def grey(value): return Image.new('RGB', (2*SIZE, SIZE), (value,)*3)
    grey(200).save(wide)
    grey(50).save(stack, save_all=True, append_images=[grey(100)])
    Image.fromarray(np.arange(SIZE*SIZE, dtype=np.uint16).reshape(SIZE, SIZE)).save(deep)
    def pictures(files, **reading):
        dls = with_unlabelled(loaders(folders, **reading), files)
        cache = dls.train.dataset.unlabelled.cache
        assert len(cache) == len(files)         # decoded before the training
        return [np.asarray(cache[i][0]) for i in range(len(files))]
    stretched, = pictures([wide])
    padded, = pictures([wide], fit='pad', label=255)
    assert (stretched == 200).all() and (padded == 0).mean() == .5
    assert pictures([deep], window=(0, SIZE*SIZE))[0].max() == 255
    pages = WithUnlabelled(PairDataset([], SIZE, page=1), [stack])
    assert (np.asarray(pages[0][0]) == 100).all()

@pytest.fixture(scope='module')
def trained(folders, backbone):
    learn = concat_learner(loaders(folders), backbone, unlabelled=files(folders), lesion_weight=True,
                           lr=2e-3, ema=.9, probe=40)
    return fit_steps(learn, 80)

def test_the_margin_opens(trained):
    margins = trained.history.evals().margin.tolist()
    assert margins[-1] > .03 and margins[-1] > margins[0]

def test_saved_loaded_sampled(trained, held_out, tmp_path):
    gen, masks = trained.model.eval(), held_out[1][:3]
    gen.save_pretrained(tmp_path)
    back = load_generator(tmp_path)
    assert type(back) is ConcatGenerator and defaults_of(back) == (2., 'mask')
    for name, p in gen.state_dict().items(): assert torch.equal(p, back.state_dict()[name]), name
    assert (sample(gen, masks, steps=4, seeds=5) == sample(back, masks, steps=4, seeds=5)).all()
    one_by_one = sample(gen, masks, steps=4, seeds=5, bs=1)
    assert np.abs(one_by_one.astype(int) - sample(gen, masks, steps=4, seeds=5)).max() <= 1

def test_guidance(trained, held_out):
    "1 is a single pass with the mask, 0 is the answer without one; 2 differs from both."
    gen, masks = trained.model.eval(), held_out[1][:3]
    drawn = {g: sample(gen, masks, steps=4, guidance=g) for g in (0., 1., 2.)}
    class Once(ConcatGenerator):
        def forward(self, zt, t, cond):
            assert cond.has_mask is None and len(zt) == 3
            return super().forward(zt, t, cond)
    once = Once(gen.as_backbone()); once.backbone = gen.backbone
    assert (sample(once, masks, steps=4, guidance=1) == drawn[1.]).all()
    without = sample(Denoiser(gen.as_backbone()), masks, steps=4, guidance=1)
    assert np.abs(without.astype(int) - drawn[0.]).max() <= 1
    assert (drawn[2.] != drawn[1.]).any() and (drawn[1.] != drawn[0.]).any()

def test_as_backbone(trained, held_out, tmp_path):
    "Exact without a mask, opened from the generator's folder, taken by others; the generator is unchanged."
    gen, mask = trained.model.eval(), held_out[1]
    before = {k: v.clone() for k, v in gen.state_dict().items()}
    bb = gen.as_backbone()
    assert bb.unet.conv_in.in_channels == bb.codec.channels and type(bb.unet.conv_in) is torch.nn.Conv2d
    zt, t = torch.randn(8, 8, 8, 8), torch.arange(8)*120
    gen.save_pretrained(tmp_path)
    with torch.no_grad():
        without = gen(zt, t, gen.condition(mask).without_mask())
        for same in (bb, Backbone.from_pretrained(tmp_path)):
            for kind in (Denoiser, ControlGenerator, SiameseGenerator, AlignmentGenerator):
                assert torch.allclose(kind(same).eval()(zt, t, gen.condition(mask)), without, atol=1e-6), kind
            assert torch.equal(Denoiser(same)(zt, t, gen.condition(mask)), without)
    for p in bb.unet.parameters(): p.data.zero_()
    after = gen.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items() if k.startswith('backbone.unet'))

def test_in_the_catalog(folders, backbone):
    assert METHODS['concat'].opens is ConcatGenerator
    learn = generator_learner('concat', loaders(folders), backbone, drop_mask=.2, min_snr=5.)
    assert learn.diffusion.drop_mask == .2 and len(losses(learn, 2)) == 2
    with pytest.raises(MedsynError, match="no setting 'drop_masks'"):
        generator_learner('concat', loaders(folders), backbone, drop_masks=.2)
