import pytest
import timm
import torch
from client_checks import SPACES, check_stays_sparse, with_zero_gradient, without_gradient

transformers = pytest.importorskip('transformers')


def features(name, **kwargs):
    return timm.create_model(name, features_only=True, **kwargs)


def detr(space, index=-1):
    levels = {'mbv2': 5, 'hr': 4}[space]
    backbone = transformers.TimmBackboneConfig(backbone=f'supernet_{space}_tiny', out_indices=[levels + index])
    config = transformers.DetrConfig(
        backbone_config=backbone,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=5,
        num_labels=3,
    )
    return transformers.DetrForObjectDetection(config).train()


def detr_loss(model):
    out = model(torch.randn(2, 3, 64, 64))
    return out.logits.square().mean() + out.pred_boxes.square().mean()


@pytest.mark.parametrize('space', SPACES)
def test_backbone_equals_timm(space):
    name = f'supernet_{space}_tiny'
    plain = features(name)
    config = transformers.TimmBackboneConfig(backbone=name, out_indices=list(range(len(plain.feature_info))))
    model = transformers.TimmBackbone(config)
    assert model.channels == plain.feature_info.channels()
    plain.load_state_dict(model._backbone.state_dict())
    x = torch.randn(2, 3, 64, 64)
    maps = model.train()(x).feature_maps
    for found, expected in zip(maps, plain.train()(x), strict=True):
        assert torch.equal(found, expected)
    sum(y.square().mean() for y in maps).backward()
    assert not with_zero_gradient(model)


@pytest.mark.parametrize('space', SPACES)
def test_backbone_takes_a_packed_ticket(space, tickets, packed):
    name = f'local-dir:{packed[space]}'
    model = transformers.TimmBackbone.from_pretrained(name, out_indices=(1, 2, 3))
    plain = features(name, pretrained=True, out_indices=(1, 2, 3))
    for key, param in plain.named_parameters():
        assert torch.equal(model._backbone.get_parameter(key), param), key
    # TimmBackbone resets the running statistics of whatever timm has loaded; they have to be loaded again
    model._backbone.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for found, expected in zip(model.eval()(x).feature_maps, plain.eval()(x), strict=True):
            assert torch.equal(found, expected)
    check_stays_sparse(
        model.train(),
        '_backbone.',
        tickets[space],
        lambda model: sum(y.square().mean() for y in model(x).feature_maps),
    )


@pytest.mark.parametrize('space', SPACES)
def test_detr_learns(space):
    model = detr(space)
    detr_loss(model).backward()
    assert not without_gradient(model)
    assert not with_zero_gradient(model.model.backbone)


@pytest.mark.parametrize('space', SPACES)
def test_detr_around_a_packed_ticket_stays_sparse(space, tickets, packed):
    # DETR replaces batch norms, and drops the activation that timm's carry: put the ticket's own back
    model = detr(space)
    level = model.config.backbone_config.out_indices[0]
    model.model.backbone.model = features(f'local-dir:{packed[space]}', pretrained=True, out_indices=(level,))
    check_stays_sparse(model, 'model.backbone.model.', tickets[space], detr_loss)


@pytest.mark.parametrize('space', SPACES)
def test_wrapper_loads_the_dense_file(space, tickets, dense):
    x = torch.randn(2, 3, 64, 64)
    built = tickets[space].build()
    model, report = transformers.TimmWrapperForImageClassification.from_pretrained(
        dense[space], output_loading_info=True
    )
    assert not any(report.values())
    with torch.no_grad():
        assert torch.equal(model.eval()(x).logits, built(x))
    check_stays_sparse(model.train(), 'timm_model.', tickets[space], lambda model: model(x).logits.square().mean())


@pytest.mark.parametrize('space', SPACES)
def test_wrapper_without_classifier_pools(space, tickets, dense):
    x = torch.randn(2, 3, 64, 64)
    model = transformers.TimmWrapperModel.from_pretrained(dense[space]).eval()
    with torch.no_grad():
        assert torch.equal(model(x).pooler_output, tickets[space].build(num_classes=0)(x))


def test_wrapper_saves_what_it_loads(tickets, dense, tmp_path):
    x = torch.randn(1, 3, 64, 64)
    model = transformers.TimmWrapperForImageClassification.from_pretrained(dense['mbv2'])
    model.save_pretrained(tmp_path)
    again = transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again.eval()(x).logits, tickets['mbv2'].build()(x))
