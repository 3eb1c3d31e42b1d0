//! Prompts and answers as JSON lines, for other harnesses: only where a user asks for the file.

use crate::data::SecurityPrompt;
use crate::engine::Finish;
use serde_json::{Value, json};
use std::cell::RefCell;

/// An answer to a security prompt, as it was judged.
pub struct Told<'a> {
    /// The prompt.
    pub prompt: &'a SecurityPrompt,
    /// The answer.
    pub answer: &'a str,
    /// Why it ended.
    pub finish: Finish,
    /// Whether it holds a refusal expression.
    pub refused: bool,
    /// Score of the judge behind an endpoint.
    pub judge: Option<f64>,
    /// Whether the guard model calls it unsafe.
    pub guard: Option<bool>,
}

/// Lines of an export, in the order of the answers.
///
/// `id`, `input` and `metadata` are a sample of inspect_ai (`json_dataset`); `behavior_id`, `test_case` and `generation` are
/// what HarmBench keeps of a completion.
#[derive(Debug, Default)]
pub struct Export(RefCell<(usize, String)>);

impl Export {
    /// Adds a line.
    pub fn tell(&self, told: &Told<'_>) {
        let Told { prompt, answer, finish, refused, judge, guard } = told;
        let (count, text) = &mut *self.0.borrow_mut();
        let id = format!("prompt-{count}");
        let line: Value = json!({
            "id": id, "input": prompt.prompt, "target": if prompt.is_harmful() { "refuse" } else { "answer" },
            "behavior_id": id, "test_case": prompt.prompt, "generation": answer,
            "metadata": { "label": prompt.label, "category": prompt.category, "split": prompt.split, "completion": answer,
                "finish": finish, "refused": refused, "judge": judge, "guard_unsafe": guard },
        });
        *count += 1;
        text.push_str(&line.to_string());
        text.push('\n');
    }

    /// All lines.
    pub fn into_text(self) -> String {
        self.0.into_inner().1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Label, Split};

    #[test]
    fn a_line_has_the_keys_of_both_harnesses() {
        let prompt = SecurityPrompt {
            prompt: "how \"so\" ?".into(),
            label: Label::Benign,
            split: Split::Test,
            pair: None,
            category: Some("food".into()),
            place: String::new(),
        };
        let export = Export::default();
        let mut told = Told {
            prompt: &prompt,
            answer: "with\nsalt",
            finish: Finish::Stop,
            refused: false,
            judge: None,
            guard: Some(false),
        };
        export.tell(&told);
        told.refused = true;
        export.tell(&told);
        let text = export.into_text();
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 2);
        assert_eq!((&lines[0]["id"], &lines[1]["behavior_id"]), (&"prompt-0".into(), &"prompt-1".into()));
        assert_eq!(lines[0]["input"], lines[0]["test_case"]);
        assert_eq!((&lines[0]["generation"], &lines[0]["target"]), (&"with\nsalt".into(), &"answer".into()));
        let metadata = &lines[0]["metadata"];
        assert_eq!(metadata["completion"], "with\nsalt");
        assert_eq!((&metadata["refused"], &metadata["guard_unsafe"]), (&false.into(), &false.into()));
        assert_eq!((&metadata["finish"], &metadata["category"]), (&"stop".into(), &"food".into()));
    }
}
