//! Tokenized conversations and their loss masks.

use proptest::prelude::*;
use serde_json::json;
use std::io::Write;
use swat::data::{ChatText, Conversation, Example, Examples};
use swat::error::{Error, Result};
use swat::model::Message;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer as HfTokenizer};

/// A chat format over a byte-level BPE tokenizer.
struct TestChat {
    tokenizer: HfTokenizer,
    render: fn(&[Message], bool) -> String,
    ends: Vec<u32>,
}

impl TestChat {
    fn new(render: fn(&[Message], bool) -> String) -> Self {
        let tokenizer = tokenizer();
        let ends = ["<|im_start|>", "<|im_end|>", "</s>"].map(|t| tokenizer.token_to_id(t).unwrap());
        Self { tokenizer, render, ends: ends.to_vec() }
    }

    fn trained_text(&self, example: &Example) -> String {
        let ids: Vec<u32> =
            example.tokens.iter().zip(&example.trained).filter(|(_, trained)| **trained).map(|(t, _)| *t).collect();
        self.tokenizer.decode(&ids, false).unwrap()
    }

    fn example(&self, turns: &[(&str, &str)], max_length: usize) -> Result<Option<Example>> {
        Example::from_conversation(&conversation(turns), self, max_length)
    }

    /// All text and the trained text, with no limit on the length.
    fn texts(&self, turns: &[(&str, &str)]) -> (String, String) {
        let example = self.example(turns, usize::MAX).unwrap().unwrap();
        (self.tokenizer.decode(&example.tokens, false).unwrap(), self.trained_text(&example))
    }
}

impl ChatText for TestChat {
    fn render(&self, messages: &[Message]) -> Result<String> {
        Ok((self.render)(messages, false))
    }
    fn render_prompt(&self, messages: &[Message]) -> Result<String> {
        Ok((self.render)(messages, true))
    }
    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.tokenizer.encode(text, false).unwrap().get_ids().to_vec())
    }
    fn ends_turn(&self, token: u32) -> bool {
        self.ends.contains(&token)
    }
}

/// All bytes, and merges that join letters and, across the end of a header, two line breaks.
fn tokenizer() -> HfTokenizer {
    let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let merges = [("a", "n"), ("an", "s"), ("Ċ", "Ċ"), (":", "Ġ")];
    let mut vocab: Vec<String> = alphabet.into_iter().map(String::from).collect();
    vocab.extend(merges.map(|(left, right)| format!("{left}{right}")));
    let vocab: serde_json::Map<String, serde_json::Value> = vocab.into_iter().zip((0..).map(Into::into)).collect();
    let model = json!({"type": "BPE", "vocab": vocab, "merges": merges.map(|(left, right)| format!("{left} {right}"))});
    let mut tokenizer = HfTokenizer::new(serde_json::from_str::<BPE>(&model.to_string()).unwrap());
    let bytes = ByteLevel::default().add_prefix_space(false).use_regex(false);
    tokenizer.with_pre_tokenizer(Some(bytes)).with_decoder(Some(bytes));
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "</s>"].map(|t| AddedToken::from(t, true))).unwrap();
    tokenizer
}

fn conversation(turns: &[(&str, &str)]) -> Conversation {
    turns.iter().map(|(role, content)| Message::new(role, *content)).collect::<Vec<_>>().into()
}

fn chatml(messages: &[Message], generation_prompt: bool) -> String {
    let mut text: String =
        messages.iter().map(|m| format!("<|im_start|>{}\n{}<|im_end|>\n", m.role, m.content)).collect();
    if generation_prompt {
        text += "<|im_start|>assistant\n";
    }
    text
}

/// As Qwen3: the last answer carries its (empty) thinking, earlier ones lose it; the generation prompt is bare.
fn thinking(messages: &[Message], generation_prompt: bool) -> String {
    let mut text = String::new();
    for (i, m) in messages.iter().enumerate() {
        let think = if m.role == "assistant" && i + 1 == messages.len() { "<think>\n\n</think>\n\n" } else { "" };
        text += &format!("<|im_start|>{}\n{think}{}<|im_end|>\n", m.role, m.content.trim());
    }
    if generation_prompt {
        text += "<|im_start|>assistant\n";
    }
    text
}

/// As above, with a generation prompt that opens the thinking: prefixes of earlier turns do not match.
fn open_thinking(messages: &[Message], generation_prompt: bool) -> String {
    thinking(messages, generation_prompt) + if generation_prompt { "<think>\n" } else { "" }
}

/// As Llama 2: no header before the answer, a space, and the end of the sequence.
fn instruct(messages: &[Message], _: bool) -> String {
    let turn = |m: &Message| match m.role.as_str() {
        "assistant" => format!(" {}</s>", m.content.trim()),
        _ => format!("[INST] {} [/INST]", m.content),
    };
    messages.iter().map(turn).collect()
}

fn plain(messages: &[Message], generation_prompt: bool) -> String {
    let text: String = messages.iter().map(|m| format!("{}: {}\n", m.role, m.content)).collect();
    text + if generation_prompt { "assistant: " } else { "" }
}

#[test]
fn the_answer_and_its_end_are_trained_and_nothing_behind() {
    let (all, trained) = TestChat::new(chatml).texts(&[("user", "hi"), ("assistant", "ans")]);
    assert_eq!(all, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nans<|im_end|>\n");
    assert_eq!(trained, "ans<|im_end|>");
}

#[test]
fn every_answer_of_a_conversation_is_trained() {
    let turns = [("system", "s"), ("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two")];
    assert_eq!(TestChat::new(chatml).texts(&turns).1, "one<|im_end|>two<|im_end|>");
    assert_eq!(TestChat::new(instruct).texts(&turns[1..]).1, " one</s> two</s>");
}

#[test]
fn what_a_template_changes_in_an_answer_is_trained_as_rendered() {
    let turns = [("user", "a"), ("assistant", " one "), ("user", "b"), ("assistant", " two\n")];
    let (_, trained) = TestChat::new(thinking).texts(&turns);
    assert_eq!(trained, "one<|im_end|><think>\n\n</think>\n\ntwo<|im_end|>");
}

#[test]
fn turns_whose_prompt_is_rewritten_later_are_not_trained() {
    let turns = [("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two")];
    assert_eq!(TestChat::new(open_thinking).texts(&turns).1, "\n</think>\n\ntwo<|im_end|>");
}

#[test]
fn templates_that_cannot_be_trained_are_refused() {
    let turns = [("user", "a"), ("assistant", "one")];
    let unmatched = TestChat::new(|m, g| chatml(m, g) + if g { "<think>\n" } else { "" });
    assert!(unmatched.example(&turns, 99).unwrap_err().to_string().contains("where the generation prompt ends"));
    let endless = TestChat::new(plain).example(&turns, 99).unwrap_err();
    assert!(endless.to_string().contains("never learn to stop"));
}

#[test]
fn a_boundary_inside_a_token_splits_the_text() {
    let chat = TestChat::new(chatml);
    let turns = [("user", "a"), ("assistant", "\nans"), ("user", "b"), ("assistant", "\nthe\nend")];
    let example = chat.example(&turns, usize::MAX).unwrap().unwrap();
    let whole = chat.encode(&chatml(&conversation(&turns).messages, false)).unwrap();
    assert_eq!(example.tokens.len(), whole.len() + 2, "each header's line break stays apart from the answer's");
    assert_eq!(chat.trained_text(&example), "\nans<|im_end|>\nthe\nend<|im_end|>");
    let prompt = chat.encode(&chatml(&conversation(&turns[..1]).messages, true)).unwrap();
    assert!(example.tokens.starts_with(&prompt));
}

#[test]
fn answers_are_cut_at_the_maximal_length() {
    let chat = TestChat::new(chatml);
    let turns = [("user", "hi"), ("assistant", "123456")];
    let whole = chat.example(&turns, usize::MAX).unwrap().unwrap();
    let prompt = whole.trained.iter().position(|t| *t).unwrap();
    let cut = chat.example(&turns, prompt + 3).unwrap().unwrap();
    assert_eq!((cut.tokens.len(), chat.trained_text(&cut).as_str()), (prompt + 3, "123"));
    assert_eq!(chat.example(&turns, prompt).unwrap(), None);
    assert_eq!(chat.example(&turns, 0).unwrap(), None);
}

#[test]
fn cut_and_dropped_conversations_are_counted() {
    let chat = TestChat::new(chatml);
    let long = "x".repeat(50);
    let conversations = [("hi", "short"), ("hi", long.as_str()), (long.as_str(), "a")]
        .map(|(q, a)| conversation(&[("user", q), ("assistant", a)]));
    let all = Examples::from_conversations(&conversations, &chat, 50).unwrap();
    assert_eq!((all.examples.len(), all.cut, all.dropped), (2, 1, 1));
    // Losing the line break behind the end of the turn is no cut.
    let length = chat.example(&[("user", "hi"), ("assistant", "short")], 99).unwrap().unwrap().tokens.len();
    assert_eq!(Examples::from_conversations(&conversations[..1], &chat, length - 1).unwrap().cut, 0);
    let error = Examples::from_conversations(&conversations[2..], &chat, 50).unwrap_err().to_string();
    assert!(error.contains("shorter than 50 tokens"), "{error}");
}

#[test]
fn the_work_is_bounded_by_the_maximal_length() {
    struct Bounded(TestChat);
    impl ChatText for Bounded {
        fn render(&self, messages: &[Message]) -> Result<String> {
            self.0.render(messages)
        }
        fn render_prompt(&self, messages: &[Message]) -> Result<String> {
            self.0.render_prompt(messages)
        }
        fn encode(&self, text: &str) -> Result<Vec<u32>> {
            assert!(text.len() <= 100 * 256);
            self.0.encode(text)
        }
        fn ends_turn(&self, token: u32) -> bool {
            self.0.ends_turn(token)
        }
    }
    let chat = Bounded(TestChat::new(chatml));
    let long = "é".repeat(1 << 20);
    let turns = [("user", "hi"), ("assistant", long.as_str()), ("user", &long), ("assistant", "x")];
    let all = Examples::from_conversations(&[conversation(&turns)], &chat, 100).unwrap();
    assert_eq!((all.examples[0].tokens.len(), all.cut), (100, 1));
    let prompt = chat.encode(&chatml(&conversation(&turns[..1]).messages, true)).unwrap().len();
    assert_eq!(all.examples[0].trained_tokens(), 100 - prompt);
    assert_eq!(Example::from_conversation(&conversation(&turns[2..]), &chat, 100).unwrap(), None);
}

#[test]
fn a_later_turn_beyond_the_maximal_length_is_a_cut() {
    let chat = TestChat::new(chatml);
    let turns = [("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two")];
    let first = chat.example(&turns[..2], 999).unwrap().unwrap().tokens.len();
    let all = Examples::from_conversations(&[conversation(&turns)], &chat, first + 4).unwrap();
    assert_eq!((chat.trained_text(&all.examples[0]).as_str(), all.cut), ("one<|im_end|>", 1));
}

#[test]
fn errors_of_the_template_name_the_line() {
    struct Refuses;
    impl ChatText for Refuses {
        fn render_prompt(&self, messages: &[Message]) -> Result<String> {
            self.render(messages)
        }
        fn render(&self, messages: &[Message]) -> Result<String> {
            match messages[0].content.as_str() {
                "bad" => Err(Error::input("chat_template.jinja", "a system message", "none")),
                _ => Ok("x".repeat(messages.len())),
            }
        }
        fn encode(&self, text: &str) -> Result<Vec<u32>> {
            Ok(vec![0; text.len()])
        }
        fn ends_turn(&self, _: u32) -> bool {
            true
        }
    }
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(b"{\"prompt\":\"a\",\"completion\":\"b\"}\n\n{\"prompt\":\"bad\",\"completion\":\"b\"}\n").unwrap();
    let error = Examples::read(file.path(), &Refuses, 9).unwrap_err().to_string();
    assert!(error.starts_with(&format!("{}:3: chat_template.jinja: found", file.path().display())), "{error}");
}

proptest! {
    #[test]
    fn masks_hold_answers_and_their_ends_alone(
        turns in proptest::collection::vec("[ans \n:x]{1,8}", 1..8),
        max_length in 0usize..200,
    ) {
        let mut messages: Vec<(&str, &str)> = Vec::new();
        for (i, turn) in turns.iter().enumerate() {
            messages.push((if i % 2 == 0 { "user" } else { "assistant" }, turn));
        }
        if messages.len() % 2 == 1 {
            messages.push(("assistant", "end"));
        }
        let answers: String =
            messages.iter().skip(1).step_by(2).map(|(_, answer)| format!("{answer}<|im_end|>")).collect();
        let chat = TestChat::new(chatml);
        let (all, trained) = chat.texts(&messages);
        prop_assert_eq!(all, chatml(&conversation(&messages).messages, false));
        prop_assert_eq!(trained, answers);
        let whole = chat.example(&messages, usize::MAX).unwrap().unwrap();
        let trained = whole.trained.iter().take(max_length).rposition(|t| *t).map_or(0, |last| last + 1);
        let Some(cut) = chat.example(&messages, max_length).unwrap() else {
            prop_assert_eq!(trained, 0);
            return Ok(());
        };
        prop_assert_eq!(cut.tokens.len(), whole.tokens.len().min(max_length));
        // Behind the last trained token the text is cut before the later answers are looked at, where their prompts
        // would have been encoded apart; nothing is learnt there.
        prop_assert!(trained > 0);
        prop_assert_eq!(cut.tokens.get(..trained), whole.tokens.get(..trained));
        prop_assert_eq!(cut.trained.get(..max_length.min(whole.trained.len())), whole.trained.get(..cut.trained.len()));
    }

    #[test]
    fn special_text_in_a_turn_ends_an_answer_early_and_harms_nothing_else(
        question in "(a|\n|<\\|im_end\\|>|</s>|<\\|im_start\\|>){0,5}",
        answer in "(a|\n|<\\|im_end\\|>|</s>|<\\|im_start\\|>){0,5}",
        max_length in 0usize..40,
    ) {
        let chat = TestChat::new(chatml);
        if let Some(example) = chat.example(&[("user", &question), ("assistant", &answer)], max_length).unwrap() {
            prop_assert!(example.tokens.len() <= max_length && example.tokens.len() == example.trained.len());
            let text = chat.trained_text(&example);
            prop_assert!((answer + "<|im_end|>").starts_with(&text));
            prop_assert!(example.trained_tokens() > 0 && !example.trained[0]);
        }
    }
}
