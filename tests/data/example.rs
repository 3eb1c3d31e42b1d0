//! Tokenized conversations and their loss masks.

use proptest::prelude::*;
use serde_json::json;
use std::collections::BTreeMap;
use std::io::Write;
use swat::data::{Chat, Conversation, Example, Examples, RowReader};
use swat::error::Result;
use swat::model::{ChatTemplate, Message, Tokenizer, Training};
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer as HfTokenizer};

/// A chat format over a byte-level BPE tokenizer.
struct TestChat {
    tokenizer: HfTokenizer,
    template: ChatTemplate,
    chat: Chat,
}

impl TestChat {
    fn new(source: &str) -> Self {
        let tokenizer = tokenizer();
        let file = tempfile::NamedTempFile::new().unwrap();
        tokenizer.save(file.path(), false).unwrap();
        let template = || ChatTemplate::new(source, "t.jinja", BTreeMap::new()).unwrap();
        let chat = Chat::new(template(), Tokenizer::open(file.path()).unwrap(), &[]);
        Self { tokenizer, template: template(), chat }
    }

    fn encode(&self, text: &str) -> Vec<u32> {
        self.tokenizer.encode(text, false).unwrap().get_ids().to_vec()
    }

    fn trained_text(&self, example: &Example) -> String {
        let ids: Vec<u32> =
            example.tokens.iter().zip(&example.trained).filter(|(_, trained)| **trained).map(|(t, _)| *t).collect();
        self.tokenizer.decode(&ids, false).unwrap()
    }

    fn example(&self, turns: &[(&str, &str)], max_length: usize) -> Result<Option<Example>> {
        Example::from_conversation(&conversation(turns), &self.chat, max_length)
    }

    /// All text and the trained text, with no limit on the length.
    fn texts(&self, turns: &[(&str, &str)]) -> (String, String) {
        let example = self.example(turns, usize::MAX).unwrap().unwrap();
        (self.tokenizer.decode(&example.tokens, false).unwrap(), self.trained_text(&example))
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

const CHATML: &str = "{% for m in messages %}<|im_start|>{{ m.role + '\\n' + m.content }}<|im_end|>{{ '\\n' }}{% endfor %}\
                      {% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}";

/// As Qwen3: the last answer carries its (empty) thinking, earlier ones lose it; the generation prompt is bare.
const THINKING: &str = "{% for m in messages %}<|im_start|>{{ m.role + '\\n' }}{% if loop.last and m.role == 'assistant' %}\
     {{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{{ m.content | trim }}<|im_end|>{{ '\\n' }}{% endfor %}\
     {% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}";

/// As Llama 2: no header before the answer, a space, and the end of the sequence.
const INSTRUCT: &str = "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content | trim }}</s>{% else %}\
                        [INST] {{ m.content }} [/INST]{% endif %}{% endfor %}";

const PLAIN: &str = "{% for m in messages %}{{ m.role }}: {{ m.content + '\\n' }}{% endfor %}\
                     {% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}";

#[test]
fn the_answer_and_its_end_are_trained_and_nothing_behind() {
    let (all, trained) = TestChat::new(CHATML).texts(&[("user", "hi"), ("assistant", "ans")]);
    assert_eq!(all, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nans<|im_end|>\n");
    assert_eq!(trained, "ans<|im_end|>");
}

#[test]
fn every_answer_of_a_conversation_is_trained() {
    let turns = [("system", "s"), ("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two")];
    assert_eq!(TestChat::new(CHATML).texts(&turns).1, "one<|im_end|>two<|im_end|>");
    assert_eq!(TestChat::new(INSTRUCT).texts(&turns[1..]).1, " one</s> two</s>");
}

#[test]
fn what_a_template_changes_in_an_answer_is_trained_as_rendered() {
    let turns = [("user", "a"), ("assistant", " one "), ("user", "b"), ("assistant", " two\n")];
    let (_, trained) = TestChat::new(THINKING).texts(&turns);
    assert_eq!(trained, "one<|im_end|><think>\n\n</think>\n\ntwo<|im_end|>");
}

#[test]
fn turns_whose_prompt_is_rewritten_later_are_trained_from_their_header() {
    // The generation prompt opens the thinking, which earlier turns lose.
    let opened = THINKING.replace("assistant{{ '\\n' }}{% endif %}", "assistant{{ '\\n<think>\\n' }}{% endif %}");
    let turns = [("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two")];
    assert_eq!(TestChat::new(&opened).texts(&turns).1, "one<|im_end|>\n</think>\n\ntwo<|im_end|>");
    let unmatched = CHATML.replace("assistant{{ '\\n' }}{% endif %}", "assistant{{ '\\n<think>\\n' }}{% endif %}");
    assert_eq!(TestChat::new(&unmatched).texts(&turns).1, "one<|im_end|>two<|im_end|>");
}

#[test]
fn templates_that_cannot_be_trained_are_refused() {
    let turns = [("user", "a"), ("assistant", "one")];
    let endless = TestChat::new(PLAIN).example(&turns, 99).unwrap_err().to_string();
    assert!(endless.starts_with("t.jinja: ") && endless.contains("never learn to stop"), "{endless}");
    let silent = TestChat::new("{{ messages[0].content }}</s>").example(&turns, 99).unwrap_err().to_string();
    assert!(silent.contains("t.jinja: found message 2 not in the rendered conversation"), "{silent}");
    assert!(silent.contains("{% generation %}"), "{silent}");
}

#[test]
fn a_prompt_ends_where_training_begins() {
    // This template ignores add_generation_prompt, so the header before each answer belongs to the prompt.
    let ignores = CHATML.replace("{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}", "");
    for (source, prompt) in [
        (ignores.as_str(), "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"),
        (CHATML, "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"),
        (INSTRUCT, "[INST] a [/INST]"),
    ] {
        let chat = TestChat::new(source);
        assert_eq!(chat.chat.prompt(&[Message::new("user", "a")], &[]).unwrap(), prompt);
        let (all, trained) = chat.texts(&[("user", "a"), ("assistant", "one")]);
        assert!(all.starts_with(&format!("{prompt}{trained}")), "{all}");
        let end = if source == INSTRUCT { "</s>" } else { "<|im_end|>" };
        assert_eq!(chat.chat.stop_tokens(), chat.encode(end));
        assert!(trained.ends_with(end), "{trained}");
    }
}

#[test]
fn turns_that_the_data_leave_out_are_context() {
    let turns = [("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two")];
    let marks = CHATML.replace(
        "{{ m.role + '\\n' + m.content }}<|im_end|>",
        "{{ m.role + '\\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}\
         {% else %}{{ m.content }}{% endif %}<|im_end|>",
    );
    for (source, second) in [(CHATML, "two<|im_end|>"), (marks.as_str(), "two")] {
        let chat = TestChat::new(source);
        let mut all = conversation(&turns);
        all.messages[1].training = Training::Context;
        let example = Example::from_conversation(&all, &chat.chat, 999).unwrap().unwrap();
        assert_eq!(chat.trained_text(&example), second);
        let trained = all.clone();
        all.messages[3].training = Training::Context;
        assert_eq!(Example::from_conversation(&all, &chat.chat, 999).unwrap(), None);
        let found = Examples::from_conversations(&[all.clone(), trained], &chat.chat, 999).unwrap();
        assert_eq!((found.examples.len(), found.dropped, found.context), (1, 0, 1));
        let error = Examples::from_conversations(&[all], &chat.chat, 999).unwrap_err().to_string();
        assert!(error.contains("1 conversations, none with an answer to train"), "{error}");
    }
}

#[test]
fn a_boundary_inside_a_token_splits_the_text() {
    let chat = TestChat::new(CHATML);
    let turns = [("user", "a"), ("assistant", "\nans"), ("user", "b"), ("assistant", "\nthe\nend")];
    let example = chat.example(&turns, usize::MAX).unwrap().unwrap();
    let whole = chat.encode(&chat.template.render(&conversation(&turns).messages).unwrap());
    assert_eq!(example.tokens.len(), whole.len() + 2, "each header's line break stays apart from the answer's");
    assert_eq!(chat.trained_text(&example), "\nans<|im_end|>\nthe\nend<|im_end|>");
    let prompt = chat.encode(&chat.template.render_prompt(&conversation(&turns[..1]).messages).unwrap());
    assert!(example.tokens.starts_with(&prompt));
}

#[test]
fn answers_are_cut_at_the_maximal_length() {
    let chat = TestChat::new(CHATML);
    let turns = [("user", "hi"), ("assistant", "123456")];
    let whole = chat.example(&turns, usize::MAX).unwrap().unwrap();
    let prompt = whole.trained.iter().position(|t| *t).unwrap();
    let cut = chat.example(&turns, prompt + 3).unwrap().unwrap();
    assert_eq!((cut.tokens.len(), chat.trained_text(&cut).as_str()), (prompt + 3, "123"));
    assert_eq!(chat.example(&turns, prompt).unwrap(), None);
    assert_eq!(chat.example(&turns, 0).unwrap(), None);
}

/// As DeepSeek-R1 and Qwen3: a template that drops thinking, and one that keeps that of the last answer.
#[test]
fn what_a_template_leaves_out_of_answers_is_counted() {
    let drops = CHATML.replace("m.content", "m.content.split('</think>')[-1]");
    let last = CHATML.replace("m.content", "(m.content if loop.last else m.content.split('</think>')[-1])");
    let thinks = "<think>\nbe brief\n</think>\n\nyes";
    let one = conversation(&[("user", "hi"), ("assistant", thinks)]);
    let two = conversation(&[("user", "hi"), ("assistant", thinks), ("user", "hi"), ("assistant", thinks)]);
    let plain = conversation(&[("user", "hi"), ("assistant", " yes\n"), ("user", "hi"), ("assistant", "yes")]);
    let mut apart = conversation(&[("user", "hi"), ("assistant", "yes")]);
    apart.messages[1].fields.insert("reasoning_content".into(), "be brief".into());
    let mut context = two.clone();
    context.messages[1].training = Training::Context;
    let all = [one, two, plain, apart, context];
    let counts = |source: &str| {
        let chat = TestChat::new(source);
        all.clone().map(|c| Examples::from_conversations(&[c], &chat.chat, 999).unwrap().left_out)
    };
    assert_eq!(counts(CHATML), [0, 0, 0, 1, 0]);
    assert_eq!(counts(&drops), [1, 1, 0, 1, 1]);
    assert_eq!(counts(&last), [0, 1, 0, 1, 0]);
    assert_eq!(counts(&CHATML.replace("m.content", "m.content | trim")), [0, 0, 0, 1, 0]);
}

#[test]
fn tools_that_a_template_does_not_declare_are_refused() {
    let mut all = conversation(&[("user", "hi"), ("assistant", "yes")]);
    all.tools = vec![json!({"name": "add"})];
    let error = Example::from_conversation(&all, &TestChat::new(CHATML).chat, 99).unwrap_err().to_string();
    assert!(error.contains("found no `tools`, which the row has"), "{error}");
    let declares = format!("{{% for t in tools or [] %}}{{{{ t.name }}}}{{% endfor %}}{CHATML}");
    assert!(Example::from_conversation(&all, &TestChat::new(&declares).chat, 99).unwrap().is_some());
}

#[test]
fn cut_and_dropped_conversations_are_counted() {
    let chat = TestChat::new(CHATML);
    let long = "x".repeat(50);
    let conversations = [("hi", "short"), ("hi", long.as_str()), (long.as_str(), "a")]
        .map(|(q, a)| conversation(&[("user", q), ("assistant", a)]));
    let all = Examples::from_conversations(&conversations, &chat.chat, 50).unwrap();
    assert_eq!((all.examples.len(), all.cut, all.dropped), (2, 1, 1));
    // Losing the line break behind the end of the turn is no cut.
    let length = chat.example(&[("user", "hi"), ("assistant", "short")], 99).unwrap().unwrap().tokens.len();
    assert_eq!(Examples::from_conversations(&conversations[..1], &chat.chat, length - 1).unwrap().cut, 0);
    let error = Examples::from_conversations(&conversations[2..], &chat.chat, 50).unwrap_err().to_string();
    assert!(error.contains("shorter than 50 tokens"), "{error}");
}

#[test]
fn the_work_is_bounded_by_the_maximal_length() {
    let chat = TestChat::new(CHATML);
    let long = "é".repeat(1 << 20);
    let turns = [("user", "hi"), ("assistant", long.as_str()), ("user", &long), ("assistant", "x")];
    let all = Examples::from_conversations(&[conversation(&turns)], &chat.chat, 100).unwrap();
    assert_eq!((all.examples[0].tokens.len(), all.cut), (100, 1));
    let prompt = chat.encode(&chat.template.render_prompt(&conversation(&turns[..1]).messages).unwrap()).len();
    assert_eq!(all.examples[0].trained_tokens(), 100 - prompt);
    assert_eq!(Example::from_conversation(&conversation(&turns[2..]), &chat.chat, 100).unwrap(), None);
}

#[test]
fn a_later_turn_beyond_the_maximal_length_is_a_cut() {
    let chat = TestChat::new(CHATML);
    let turns = [("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two")];
    let first = chat.example(&turns[..2], 999).unwrap().unwrap().tokens.len();
    let all = Examples::from_conversations(&[conversation(&turns)], &chat.chat, first + 4).unwrap();
    assert_eq!((chat.trained_text(&all.examples[0]).as_str(), all.cut), ("one<|im_end|>", 1));
}

#[test]
fn errors_of_the_template_name_the_line() {
    let refuses =
        CHATML.replace("{% for", "{% if messages[0].content == 'bad' %}{{ raise_exception('bad') }}{% endif %}{% for");
    let chat = TestChat::new(&refuses);
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(b"{\"prompt\":\"a\",\"completion\":\"b\"}\n\n{\"prompt\":\"bad\",\"completion\":\"b\"}\n").unwrap();
    let error = Examples::read(file.path(), &chat.chat, 99, &mut RowReader::default()).unwrap_err().to_string();
    assert!(error.starts_with(&format!("{}:3: t.jinja: found", file.path().display())), "{error}");
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
        let chat = TestChat::new(CHATML);
        let (all, trained) = chat.texts(&messages);
        prop_assert_eq!(all, chat.template.render(&conversation(&messages).messages).unwrap());
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
    fn special_text_in_an_answer_is_trained_to_the_end_of_the_turn(
        question in "(a|\n|<\\|im_end\\|>|</s>|<\\|im_start\\|>){0,5}",
        answer in "(a|\n|<\\|im_end\\|>|</s>|<\\|im_start\\|>){0,5}",
        max_length in 0usize..40,
    ) {
        let chat = TestChat::new(CHATML);
        if let Some(example) = chat.example(&[("user", &question), ("assistant", &answer)], max_length).unwrap() {
            prop_assert!(example.tokens.len() <= max_length && example.tokens.len() == example.trained.len());
            let text = chat.trained_text(&example);
            let whole = chat.example(&[("user", &question), ("assistant", &answer)], 999).unwrap().unwrap();
            prop_assert_eq!(chat.trained_text(&whole), answer.clone() + "<|im_end|>");
            prop_assert!((answer + "<|im_end|>").starts_with(&text));
            prop_assert!(example.trained_tokens() > 0 && !example.trained[0]);
        }
    }
}
