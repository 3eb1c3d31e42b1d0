//! The page and the model card of a secure tuning run.

use crate::study::figure;
use crate::xml::check_xml;
use std::collections::BTreeMap;
use std::path::Path;
use swat::report::{model_card, secure_report};
use swat::secure::pipeline::{BaseModel, PartSizes, SecureMeasures, SecureOutcome, Tried};
use swat::secure::{AnswerKinds, Check, Evaluation, Limits, Measures, Perplexity, Rate};

/// What was tried: attack successes and solved tasks of 50 each, and a held-out loss.
fn tried(recipe: &str, (alpha, chosen): (f64, bool), (attacks, solved): (usize, usize), nll: f64) -> Tried {
    let rate = |hits| Some(Rate::new(hits, 50));
    let shares = Measures { asr: rate(attacks), task: rate(solved), ..Measures::default() };
    let heldout = Some(Perplexity { tokens: 100, nll, perplexity: nll.exp() });
    let measures = SecureMeasures { shares, heldout };
    Tried { recipe: recipe.into(), alpha, excess: 0.0, chosen, measures }
}

/// A run that tried a recipe and chose a point of its path, with so many selection tasks.
fn run(valid_tasks: usize, license: Option<&str>) -> (SecureOutcome, Check) {
    let rate = |hits| Rate::new(hits, 50);
    let found = Evaluation {
        asr: Some(rate(2)),
        over_refusal: Some(rate(1)),
        asr_coherent: Some(rate(1)),
        harmful_answers: Some(AnswerKinds { empty: rate(0), cut_off: rate(5), incoherent: rate(1) }),
        ..Evaluation::default()
    };
    let check = Check::new((Path::new("model"), &found), (Path::new("tuned"), &found), Limits::default());
    let outcome = SecureOutcome {
        format: "swat.secure/1",
        settings: Vec::new(),
        recommended: None,
        limits: Limits::default(),
        verdict: check.verdict.clone(),
        tried: vec![
            tried("given", (0.0, false), (2, 20), 3.0),
            tried("plain+replay=.15", (1.0, false), (20, 45), 1.0),
            tried("plain+replay=.15", (0.9, true), (3, 40), 1.5),
        ],
        advice: Vec::new(),
        replay: None,
        screened: None,
        data: PartSizes { valid_prompts: 100, valid_tasks, ..PartSizes::default() },
        base: BaseModel {
            name: "model".into(),
            adapter: None,
            hash: "0123abcd".into(),
            license: license.map(str::to_owned),
        },
        seed: 0,
        files: BTreeMap::new(),
        swat: "0.0.0".into(),
        command: "swat secure --model model".into(),
    };
    (outcome, check)
}

#[test]
fn what_was_tried_is_drawn_with_the_model_as_given_and_the_limits() {
    let (outcome, check) = run(50, None);
    let report = secure_report(&outcome, &check);
    let svg = figure(&report, "front");
    check_xml(svg).unwrap();
    // Half of the limits are 1 point of attack success above 4 %, and half a point of the task score below 40 %.
    for text in [
        "Scatter plot of 4 points: attack success, % against task score, %.",
        "<title>original: 40.00, 4.000 (",
        "<title>half the limits: 39.50, 5.000</title>",
        "<title>plain+replay=.15: 90.00, 40.00 (",
        "<title>plain+replay=.15, alpha 0.90: 80.00, 6.000 (",
        ">chosen</text>",
    ] {
        assert!(svg.contains(text), "{text}: {svg}");
    }
    assert!(report.html().unwrap().contains("Best is the lower right corner"));

    // Without tasks against the loss, which has no limit.
    let (mut outcome, check) = run(0, None);
    let report = secure_report(&outcome, &check);
    let svg = figure(&report, "front");
    for text in [
        "attack success, % against held-out loss, nats a token.",
        "<title>half the limits: 3.000, 5.000</title>",
        "<title>plain+replay=.15, alpha 0.90: 1.500, 6.000 (",
    ] {
        assert!(svg.contains(text), "{text}: {svg}");
    }
    // One point is no front.
    outcome.tried.truncate(1);
    assert!(secure_report(&outcome, &check).sections.iter().all(|section| section.figures.is_empty()));
}

#[test]
fn empty_incoherent_and_cut_off_answers_are_told() {
    let (outcome, check) = run(50, Some("apache-2.0"));
    let report = secure_report(&outcome, &check);
    let tables: Vec<String> = report.sections[0].tables.iter().map(|table| table.markdown()).collect();
    let card = model_card(&outcome, &check);
    for row in [
        "| attack success by coherent answers, % | 2.0 (",
        "| answers to harmful prompts: empty, % | 0.0 (",
        "| answers to harmful prompts: incoherent, % | 2.0 (",
        "| answers to harmful prompts: cut off, % | 10.0 (",
    ] {
        assert!(tables[2].contains(row) && card.contains(row), "{row}: {} {card}", tables[2]);
    }
    // What nobody was asked has no rows, and no gate is about any of it.
    assert!(!tables[2].contains("benign prompts") && !tables[0].contains("coherent"), "{tables:?}");
}

#[test]
fn a_card_says_where_the_licence_is_unknown() {
    let begins = |license: Option<&str>| {
        let (outcome, check) = run(50, license);
        model_card(&outcome, &check).split("library_name").next().unwrap_or_default().to_owned()
    };
    assert_eq!(begins(Some("mit")), "---\nbase_model: \"model\"\nlicense: \"mit\"\n");
    assert_eq!(begins(None), "---\nbase_model: \"model\"\nlicense: unknown\n");
}
