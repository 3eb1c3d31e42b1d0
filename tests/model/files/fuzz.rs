//! Any bytes are read or refused.

use super::stored::*;
use proptest::prelude::*;
use std::fs;
use swat::io::safetensors::{Dtype, Safetensors};
use swat::model::ModelDir;
use tempfile::TempDir;

#[test]
fn safetensors_of_any_kind_are_read() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("x.safetensors");
    fs::write(&path, safetensors(&tensors())).unwrap();
    let file = Safetensors::open(&path).unwrap();
    assert_eq!(file.tensors().count(), tensors().len());
    assert_eq!(file.info("model.norm.weight").unwrap(), (Dtype::F32, &[4][..]));
    assert!(file.values("nothing").unwrap_err().to_string().contains("no tensor `nothing`"));
}

fn opens(dir: &TempDir) {
    if let Ok(model) = ModelDir::open(dir.path()) {
        for (id, shape) in model.config.params() {
            let _ = model.tensor(id, &shape);
        }
        model.hash().unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn random_weights_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), length in 0u64..300) {
        let dir = model(&config(), &[]);
        let path = dir.path().join("model.safetensors");
        fs::write(&path, &bytes).unwrap();
        opens(&dir);
        fs::write(&path, [&length.to_le_bytes()[..], &bytes].concat()).unwrap();
        opens(&dir);
    }

    #[test]
    fn mutated_weights_never_panic(at in 0usize..1_000_000, bytes in proptest::collection::vec(any::<u8>(), 0..6), cut in 0usize..6) {
        let mut file = safetensors(&tensors());
        let header = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let at = at % header;
        file.splice(at..(at + cut).min(file.len()), bytes);
        let dir = model(&config(), &[]);
        fs::write(dir.path().join("model.safetensors"), file).unwrap();
        opens(&dir);
    }

    #[test]
    fn mutated_numbers_never_panic(at in 0usize..1000, number: u64) {
        // Every number of the header in turn.
        let file_bytes = safetensors(&tensors());
        let length = u64::from_le_bytes(file_bytes[..8].try_into().unwrap()) as usize;
        let header = std::str::from_utf8(&file_bytes[8..8 + length]).unwrap();
        let starts: Vec<usize> = header.char_indices().filter(|(i, c)| {
            c.is_ascii_digit() && matches!(header.as_bytes()[i - 1], b'[' | b',')
        }).map(|(i, _)| i).collect();
        let start = starts[at % starts.len()];
        let end = start + header[start..].find(|c: char| !c.is_ascii_digit()).unwrap();
        let header = format!("{}{number}{}", &header[..start], &header[end..]);
        let dir = model(&config(), &[]);
        fs::write(dir.path().join("model.safetensors"), file(&header, &file_bytes[8 + length..])).unwrap();
        opens(&dir);
    }

    #[test]
    fn mutated_indices_never_panic(at in 0usize..1_000_000, bytes in proptest::collection::vec(any::<u8>(), 0..6), cut in 0usize..6) {
        let dir = sharded(|_| {});
        let path = dir.path().join("model.safetensors.index.json");
        let mut index = fs::read(&path).unwrap();
        let at = at % index.len();
        index.splice(at..(at + cut).min(index.len()), bytes);
        fs::write(&path, index).unwrap();
        opens(&dir);
    }
}
