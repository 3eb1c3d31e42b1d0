//! Losses of recipes on a golden model, against what PyTorch computes in f64 (`tests/golden/recipes.py`).

use crate::run::{Run, bits, options, two_phases};
use serde_json::Value;
use std::path::{Path, PathBuf};
use swat::backend::cpu::Cpu;
use swat::backend::{Backend, IGNORE};
use swat::engine::{Batch, Decoder, GradientOptions, Gradients, TokenTerms};
use swat::model::ModelDir;
use swat::train::TuneOptions;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn model() -> Decoder<Cpu> {
    let files = ModelDir::open(&golden().join("llama")).unwrap();
    Decoder::new(Cpu::new(), files.config.clone(), |id, shape| files.tensor(id, shape)).unwrap()
}

fn batch() -> Batch {
    #[derive(serde::Deserialize)]
    struct Case {
        documents: Vec<Vec<u32>>,
        targets: Vec<Vec<Option<u32>>>,
    }
    let case: Case = serde_json::from_value(json(&golden().join("llama/case.json"))).unwrap();
    let mut batch = Batch::from_prompts(case.documents.iter().map(Vec::as_slice));
    batch.targets = case.targets.into_iter().flatten().map(|target| target.unwrap_or(IGNORE)).collect();
    batch
}

/// The loss, and every gradient's norm and product with cos(0), cos(1), … as PyTorch has them.
fn compare(case: &str, batch: &Batch, options: GradientOptions) {
    let (decoder, expected) = (model(), json(&golden().join("recipes.json"))[case].clone());
    let mut gradients = Gradients::new(&decoder, |_| true).unwrap();
    let loss = decoder.loss_and_gradients(batch, &mut gradients, options).unwrap();
    let exact = expected["loss"].as_f64().unwrap();
    assert!((loss / exact - 1.0).abs() < 1e-5, "{case}: loss {loss}, PyTorch {exact}");
    let norms = expected["gradients"].as_object().unwrap();
    assert_eq!(norms.len(), decoder.params().len());
    for (id, gradient) in gradients.iter() {
        let mut values = vec![0f32; gradient.len()];
        decoder.backend.read(gradient.view(), &mut values).unwrap();
        let norm = values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let product: f64 = values.iter().enumerate().map(|(i, x)| f64::from(*x) * (i as f64).cos()).sum();
        let [exact, exact_product] = [0, 1].map(|i| norms[&id.to_string()][i].as_f64().unwrap());
        let error = ((norm - exact).abs()).max((product - exact_product).abs()) / exact;
        assert!(error < 2e-5, "{case}: {id}: {norm} {product}, PyTorch {exact} {exact_product}");
    }
}

#[test]
fn constrained_and_distilled_losses_are_those_of_pytorch() {
    let mut batch = batch();
    let tokens = batch.trained_tokens();
    let probs = |row: usize| if row.is_multiple_of(3) { [0.0; 3] } else { [0.5, 0.3, 0.2] };
    batch.terms = Some(TokenTerms {
        reference: (0..tokens).map(|row| 3.0 + 0.25 * (row % 5) as f32).collect(),
        beta: (0..tokens).map(|row| [0.5, 2.0, 0.1, 0.0][row % 4]).collect(),
        ids: (0..tokens).flat_map(|row| (0..3).map(move |j| ((7 * row + 5 * j) % 47) as u32)).collect(),
        probs: (0..tokens).flat_map(probs).collect(),
        distil: 0.7,
    });
    compare("terms", &batch, GradientOptions::scaled(1.0));
}

#[test]
fn a_vaccinated_step_is_that_of_pytorch() {
    for recompute in [false, true] {
        let options = GradientOptions { vaccine: Some(0.8), recompute, ..GradientOptions::scaled(1.0) };
        compare("vaccine", &batch(), options);
    }
}

/// The move raises the loss by its length times the gradient's norm, to first order; without what trains in the lower
/// layer, and with little of it.
#[test]
fn the_move_is_along_the_gradient() {
    let (decoder, batch) = (model(), batch());
    let norm = json(&golden().join("recipes.json"))["vaccine"]["norm"].as_f64().unwrap();
    for lowest in [0, 1, 2] {
        let loss = |vaccine, scale| {
            let trains = |id: swat::modules::ParamId| id.layer().map_or(lowest == 2, |layer| layer >= lowest);
            let mut gradients = Gradients::new(&decoder, trains).unwrap();
            let options = GradientOptions { vaccine, ..GradientOptions::scaled(scale) };
            decoder.loss_and_gradients(&batch, &mut gradients, options).unwrap()
        };
        let (rho, plain) = (0.02, loss(None, 1.0));
        for scale in [1.0, 1e-3] {
            let slope = (loss(Some(rho), scale) - plain) / f64::from(rho);
            assert!((slope / norm - 1.0).abs() < 0.02, "{slope} along a gradient of {norm}, from layer {lowest}");
        }
    }
}

#[test]
fn vaccinated_runs_resume() {
    fn with(dir: Option<&Path>) -> Run<'_> {
        let options = TuneOptions { vaccine: Some(0.5), batch_size: 1, grad_accum: 2, ..options() };
        Run { options, phases: two_phases(3, 3), ..Run::new(dir) }
    }
    let (_, expected, _) = with(None).run();
    let plain = Run { options: TuneOptions { vaccine: None, ..with(None).options }, ..with(None) }.run().1;
    assert_ne!(bits(&plain), bits(&expected));
    let dir = tempfile::tempdir().unwrap();
    assert!(Run { stop_at: Some(4), ..with(Some(dir.path())) }.run().0.is_err());
    assert_eq!(bits(&with(Some(dir.path())).run().1), bits(&expected));
}
