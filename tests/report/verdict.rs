//! The verdict, the recommended recipe and the claims of a study.

use crate::study::{ALL, figure, outcome, parse, rate, report, two_seeds};
use serde_json::{Value, json};
use swat::secure::study::{Conclusion, RunConfig};

#[test]
fn the_recommended_setting_follows_the_rule() {
    let conclude = |value: Value| Conclusion::new(&parse(value).settings, &RunConfig::default().limits);
    let all = conclude(outcome(&ALL));
    assert_eq!(all.recommended.as_deref(), Some("plain-equal+refusals"), "{}", all.reason);
    assert!(all.verdict.held);
    let changes: Vec<(String, f64)> =
        all.verdict.gates.iter().map(|gate| (gate.name.clone(), (10.0 * gate.value).round() / 10.0)).collect();
    // From 2 to 1 of 100, from 3 to 3 of 50, from 40 to 189 of 200.
    let expected = [("asr_rise", -1.0), ("over_refusal_rise", 0.0), ("task_drop", -74.5)];
    assert_eq!(changes, expected.map(|(name, value)| (name.to_owned(), value)));

    // 150 of 200 tasks are below the interval of plain tuning's 180, 85.1 to 93.4 %.
    let four = [("given", 2, 40), ("plain", 60, 180), ("swat", 40, 188), ("warmup:random:1", 30, 150)];
    let found = conclude(outcome(&four));
    assert_eq!(found.recommended.as_deref(), Some("swat"), "{}", found.reason);
    assert!(found.reason.contains("2 of 3 settings") && found.reason.contains("85.1 %"), "{}", found.reason);
    assert!(!found.verdict.held && !found.verdict.gates[0].held && found.verdict.gates[1].held);

    // 20 of 50 benign prompts refused, where it were 3.
    let mut refusing = outcome(&four);
    refusing["settings"][2]["evaluation"]["over_refusal"] = rate(20, 50);
    assert_eq!(conclude(refusing).recommended.as_deref(), Some("plain"));
    // Of equal attack success the higher J.
    let mut equal = outcome(&[("given", 2, 40), ("plain", 40, 188), ("swat", 40, 188), ("reversed", 40, 188)]);
    equal["settings"][2]["evaluation"]["over_refusal"] = rate(2, 50);
    assert_eq!(conclude(equal).recommended.as_deref(), Some("swat"));
    // Attacked data are compared with attacked data alone.
    let attacked = [("given", 2, 40), ("plain", 60, 180), ("swat+attack", 1, 190)];
    assert_eq!(conclude(outcome(&attacked)).recommended.as_deref(), Some("plain"));
    // A study in which every setting has adapters, or another length.
    let adapted = [("given", 2, 40), ("plain+lora=8,lr=2e-4", 60, 180), ("swat+lora=8,lr=2e-4", 40, 188)];
    assert_eq!(conclude(outcome(&adapted)).recommended.as_deref(), Some("swat+lora=8,lr=2e-4"));
    for (settings, reason) in [
        (&[("plain", 60, 180), ("swat", 40, 188)][..], "no setting `given`"),
        (&[("given", 2, 40), ("swat", 40, 188)], "no setting `plain`"),
    ] {
        let none = conclude(outcome(settings));
        assert!(none.recommended.is_none() && none.reason.contains(reason) && !none.verdict.held, "{none:?}");
    }
    let mut none = outcome(&[("given", 2, 40), ("plain", 60, 180)]);
    none["settings"][1]["evaluation"]["over_refusal"] = rate(40, 50);
    assert!(conclude(none).reason.starts_with("none of 1 settings"));
}

#[test]
fn the_verdict_comes_first_and_names_are_whole() {
    let report = report(outcome(&ALL));
    assert_eq!(report.sections[0].heading, "Verdict");
    let gates = report.sections[0].tables[0].markdown();
    assert!(gates.contains("| rise of attack success | -1.0 (") && gates.contains("| held"), "{gates}");
    // The recommended setting has a colour of its own in both fronts.
    for front in ["front", "front-refusal"] {
        assert!(figure(&report, front).contains(">recommended</text>"), "{front}");
    }
    let long = "warmup:layers.0-1.{q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj}";
    let report = self::report(outcome(&[("given", 2, 40), ("plain", 60, 180), (long, 85, 190), ("swat", 60, 180)]));
    for front in ["front", "results"] {
        let text: String = figure(&report, front)
            .split("<text")
            .skip(1)
            .map(|part| {
                let (_, part) = part.split_once('>').unwrap_or_default();
                part.split("</text>").next().unwrap_or_default().to_owned()
            })
            .collect();
        assert!(
            text.replace(' ', "").contains("{q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj}"),
            "{front}: {text}"
        );
    }
    assert!(
        !report.sections.iter().flat_map(|s| &s.figures).any(|f| f.name.starts_with("front") && f.svg.contains('…'))
    );
}

#[test]
fn claims_are_distances_to_the_front_of_plain_tuning() {
    let mut value = two_seeds();
    // 10 and 4 % of the benign prompts refused, where the plain runs and the original model refuse 6 %.
    value["settings"][2]["evaluation"]["over_refusal"] = rate(5, 50);
    value["settings"][2]["more_seeds"][0]["evaluation"]["over_refusal"] = rate(2, 50);
    let claims = |value: Value| {
        let report = report(value);
        let compared = report.sections.iter().find(|section| section.heading == "Comparisons").unwrap();
        compared.tables[0].markdown()
    };
    let table = claims(value);
    // Above the task score of the plain runs their attack success counts: 40 − 80 and 50 − 60. Mean −25, standard
    // deviation 21.21, and 12.706 · 21.21 / √2 = 190.6. Over-refusal: 10 − 6 and 4 − 6, mean 1, ± 12.706 · 4.243 / √2. J has
    // both: 50 − 86 and 54 − 66, mean −24, ± 12.706 · 16.97 / √2.
    let row = "| SWAT | -25.0 (-215.6 to 165.6) | 1.0 (-37.1 to 39.1) | -24.0 (-176.5 to 128.5) |";
    assert!(table.contains(row), "{table}");
    // An interval that includes 0 was tested; one training seed tests nothing.
    assert!(table.contains("| not established | not established |") && !table.contains("| plain"), "{table}");
    assert!(!table.contains("| not tested"), "{table}");
    let table = claims(outcome(&ALL));
    assert!(table.contains("| not tested | not tested |") && !table.contains("| not established"), "{table}");
}

#[test]
fn claims_at_the_same_loss_and_for_the_same_tokens() {
    let mut value = two_seeds();
    let settings = value["settings"].as_array_mut().unwrap();
    for (setting, nll, share) in
        settings.iter_mut().zip([3.0, 1.0, 2.0, 2.0]).zip([1.0, 1.0, 0.75, 1.0]).map(|((s, n), t)| (s, n, t))
    {
        let mut change = |run: &mut Value| {
            run["evaluation"]["perplexity"] = json!({ "tokens": 100, "nll": nll, "perplexity": f64::exp(nll) });
            if run["tuned"].is_object() {
                run["tuned"]["task_share"] = json!(share);
            }
        };
        setting.get_mut("more_seeds").and_then(Value::as_array_mut).into_iter().flatten().for_each(&mut change);
        change(setting);
    }
    let report = report(value);
    let compared = report.sections.iter().find(|section| section.heading == "Comparisons").unwrap();
    let [score, loss, tokens] = compared.tables.as_slice() else { panic!("{} tables", compared.tables.len()) };
    assert!(score.markdown().contains("| SWAT | -25.0 (-215.6 to 165.6) |"));
    // Half way from 2 % at loss 3 to 80 and 60 % at loss 1 are 41 and 31: 40 − 41 and 50 − 31, mean 9, ± 12.706 · 14.14 / √2.
    assert!(loss.markdown().contains("| SWAT | 9.0 (-118.1 to 136.1) |"), "{}", loss.markdown());
    // Three quarters of plain tuning's tokens: 40 − 60.5 and 50 − 45.5.
    assert!(tokens.markdown().contains("| SWAT | -8.0 (-166.8 to 150.8) |"), "{}", tokens.markdown());
    for front in ["front-loss", "front-refusal-loss"] {
        assert!(figure(&report, front).contains("held-out loss, nats a token"), "{front}");
    }
    assert!(tokens.caption.contains("for the same trained tokens of the task"));
}
