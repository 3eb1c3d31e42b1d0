//! Options of a run: defaults, ranges, durations.

use swat::train::{Length, PhaseOptions, TuneOptions};

#[test]
fn unknown_fields_are_refused_and_defaults_fill_the_rest() {
    let options: TuneOptions = serde_json::from_str(r#"{"batch_size": 3}"#).unwrap();
    assert_eq!(options, TuneOptions { batch_size: 3, ..TuneOptions::default() });
    let wrong = serde_json::from_str::<PhaseOptions>(r#"{"learning_rate": 1.0}"#).unwrap_err();
    assert!(wrong.to_string().contains("learning_rate"), "{wrong}");
}

#[test]
fn wrong_values_are_named() {
    let named = |options: TuneOptions| options.check().unwrap_err().to_string();
    assert!(named(TuneOptions { beta1: 1.0, ..TuneOptions::default() }).contains("beta1"));
    assert!(named(TuneOptions { grad_accum: 0, ..TuneOptions::default() }).contains("grad_accum"));
    assert!(named(TuneOptions { ema_decay: Some(f32::NAN), ..TuneOptions::default() }).contains("ema_decay"));
    assert!(named(TuneOptions { constrain: Some(0.0), ..TuneOptions::default() }).contains("constrain"));
    assert!(named(TuneOptions { vaccine: Some(f32::NAN), ..TuneOptions::default() }).contains("vaccine"));
    assert!(named(TuneOptions { prox: Some(-1.0), ..TuneOptions::default() }).contains("prox"));
    assert!(named(TuneOptions { distil: Some(f32::INFINITY), ..TuneOptions::default() }).contains("distil"));
    assert!(TuneOptions::default().check().is_ok());
    let named = |options: PhaseOptions| options.check().unwrap_err().to_string();
    assert!(named(PhaseOptions { lr: f64::NAN, ..PhaseOptions::default() }).contains("lr"));
    assert!(named(PhaseOptions { weight_decay: -0.1, ..PhaseOptions::default() }).contains("weight_decay"));
    assert!(named(PhaseOptions { epochs: Some(1), steps: Some(1), ..PhaseOptions::default() }).contains("both"));
}

#[test]
fn length_is_one_epoch_unless_told() {
    let length = |epochs, steps| PhaseOptions { epochs, steps, ..PhaseOptions::default() }.length().unwrap();
    assert_eq!(length(None, None), Length::Epochs(1));
    assert_eq!(length(Some(0), None), Length::Epochs(0));
    assert_eq!(length(None, Some(7)), Length::Steps(7));
}
