//! Text form of perturbations.

use swat::secure::Noise;

#[test]
fn kinds_read_back() {
    for text in ["gaussian", "rademacher", "lowrank:8", "scale", "zero", "update:out/tuned"] {
        assert_eq!(text.parse::<Noise>().unwrap().to_string(), text);
    }
    for text in ["", "gauss", "lowrank:", "lowrank:0", "lowrank:x", "update:", "zero:1"] {
        assert!(text.parse::<Noise>().is_err(), "{text}");
    }
}
