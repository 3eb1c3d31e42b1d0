//! Training conversations in the layouts of the usual trainers.

mod turns;

use super::rows::{Row, RowReader, is_blank, kind, short};
use crate::error::Result;
use crate::model::{Message, Training};
use serde_json::Value;
use std::path::Path;
use turns::{parsed, trained, turns};

const LAYOUTS: &str = "alpaca (`instruction`, `output`, optionally `input`), sharegpt (`conversations`), messages \
                       (`messages`), prompt-completion (`prompt`, `completion`), or one of `prompt`, `question`, \
                       `query`, `instruction` with one of `response`, `answer`, `output`, `completion`; --columns \
                       KEY=COLUMN names other columns";

/// Keys of a question and of its answer; a row has one of each.
const QUESTIONS: [&str; 4] = ["prompt", "question", "query", "instruction"];
const ANSWERS: [&str; 4] = ["completion", "response", "answer", "output"];
/// Keys of a list of turns beside the older `conversations` and `messages`.
const TURNS: [&str; 1] = ["conversation"];
/// Keys of a row's system message.
const SYSTEM: [&str; 3] = ["system", "system_prompt", "system_message"];

/// Rows of other kinds of training, by a key of theirs.
const OTHER_KINDS: [(&str, &str); 6] = [
    (
        "chosen",
        "pairs of preferred answers are not trained on; --columns completion=chosen (or messages=chosen) takes \
                the preferred one",
    ),
    (
        "text",
        "`text` has no answer that could be told from its prompt, and swat trains answers alone: split it into \
              `prompt` and `completion`",
    ),
    ("segments", "swat marks answers by the chat template: `messages` in place of `segments`"),
    ("input_ids", "swat tokenizes text itself: `messages` in place of `input_ids`"),
    ("completions", "one `completion` a row"),
    ("prompt", "a prompt without an answer: `completion` or `response`"),
];

/// A training conversation: an optional system message, then user and assistant in turn, ending with the assistant.
/// Results of tools may follow an assistant's message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conversation {
    /// Roles are `system`, `user`, `assistant`, `tool`; each says by [`Message::training`] whether it is trained.
    pub messages: Vec<Message>,
    /// Declarations of tools, as JSON schemas, for the template; none if empty.
    pub tools: Vec<Value>,
}

impl From<Vec<Message>> for Conversation {
    fn from(messages: Vec<Message>) -> Self {
        Self { messages, tools: Vec::new() }
    }
}

impl Conversation {
    /// Reads a file of conversations; its rows may be of different layouts.
    ///
    /// # Errors
    /// As [`RowReader::read`].
    pub fn read(path: &Path, rows: &mut RowReader) -> Result<Vec<Self>> {
        rows.read(path, Self::from_row)
    }

    /// Parses one row; its keys tell the layout:
    ///
    /// - alpaca: `instruction`, `output`, and optionally `input`, which is appended to the instruction after a blank
    ///   line;
    /// - sharegpt: `conversations: [{"from": "human", "value": …}, {"from": "gpt", "value": …}]`;
    /// - messages: `messages: [{"role": "user", "content": …}, …]`, the content a string or a list of text parts;
    /// - prompt-completion: `prompt`, `completion`, each a string or a list of messages, of which only those of the
    ///   completion are trained;
    /// - a question (`prompt`, `question`, `query`, `instruction`, or `input` alone) and its answer (`response`,
    ///   `answer`, `output`, `completion`); a question may be a list of messages as well.
    ///
    /// Turns of both lists may have the keys of the other. Beside each layout: `system` or `system_prompt`; `tools`, a
    /// list or its JSON text; `history`, earlier pairs of question and answer; `weight` (0 or 1) or `train` of the row
    /// or of an assistant's turn. Keys that would change what the row means, but are not supported, are refused; all
    /// others are metadata and ignored. An empty system message is dropped.
    ///
    /// # Errors
    /// [`crate::error::Error::Input`] where the keys match no layout or several, or a user or assistant turn is empty
    /// or out of turn.
    pub fn from_row(row: &Row) -> Result<Self> {
        refuse_unsupported(row)?;
        let mut messages = messages(row)?;
        put_system(row, &mut messages)?;
        if trained(row, &["weight", "train", "loss_weight"], &row.fields, "")? == Some(false) {
            forget(&mut messages);
        }
        Ok(Self { messages: checked(row, messages)?, tools: tools(row)? })
    }
}

/// The conversation of a chat file's row, which a model is to continue: `messages` that do not end with the assistant,
/// or `prompt`, a string or a list of messages; optionally `system`. Messages are read as those of training rows.
///
/// # Errors
/// [`crate::error::Error::Input`] where it has neither, or no question.
pub fn chat_prompt(row: &Row) -> Result<Vec<Message>> {
    row.refuse(&["tools", "functions", "images", "chat_template_kwargs"], "messages alone")?;
    let expected = "\"messages\": a list of {\"role\", \"content\"} that ends with the user, or \"prompt\": text";
    let mut messages = match (row.get("prompt"), row.get("messages")) {
        (Some(Value::Array(_)), _) => turns(row, "prompt", "role")?,
        (Some(_), _) => vec![Message::new("user", row.text("prompt")?)],
        (None, Some(_)) => turns(row, "messages", "role")?,
        (None, None) => return Err(row.error(format!("the keys {}", row.keys()), expected)),
    };
    put_system(row, &mut messages)?;
    match messages.last() {
        Some(last) if last.role != "assistant" => Ok(messages),
        _ => Err(row.error("no question to answer", expected)),
    }
}

/// Refuses keys that change what is trained in ways that swat has not.
fn refuse_unsupported(row: &Row) -> Result<()> {
    let media = ["images", "image", "videos", "video", "audios", "audio"];
    row.refuse(&media, "text alone: swat tunes language models")?;
    row.refuse(&["functions"], "`tools`, and `tool_calls` in the messages")?;
    let options = ["chat_template_kwargs", "enable_thinking", "documents"];
    let unused = "(--columns unused=KEY leaves it out)";
    row.refuse(&options, &format!("rows that the chat template renders without options of their own {unused}"))?;
    row.refuse(&["suffix"], &format!("`prompt` and `completion`: swat does not train to fill in the middle {unused}"))?;
    let masks = ["loss_mask", "train_mask", "weights"];
    row.refuse(&masks, &format!("`weight` or `train` in each turn {unused}"))?;
    for key in ["label", "kto_tag"] {
        let false_text = |value: &Value| value.as_str().is_some_and(|text| text.trim().eq_ignore_ascii_case("false"));
        if row.get(key).is_some_and(|value| *value == Value::Bool(false) || false_text(value)) {
            let found = format!("{} false, an answer that is marked as bad", row.name(key));
            return Err(row.error(found, "answers to learn; --skip-bad-rows leaves the others out"));
        }
    }
    Ok(())
}

fn messages(row: &Row) -> Result<Vec<Message>> {
    let has = |key: &str| row.get(key).is_some();
    let alpaca = has("instruction") && has("output");
    let lists = ["conversations", "messages"].map(has);
    let completion = has("prompt") && has("completion");
    match (alpaca, lists, completion) {
        (true, [false, false], false) => pair(row, "instruction", "output"),
        (false, [true, false], false) => turns(row, "conversations", "from"),
        (false, [false, true], false) => turns(row, "messages", "role"),
        (false, [false, false], true) => {
            refuse_beside_prompt(row)?;
            let mut all = side(row, "prompt", "user")?;
            forget(&mut all);
            all.extend(side(row, "completion", "assistant")?);
            Ok(all)
        }
        (false, [false, false], false) => other_messages(row),
        _ => Err(several(row)),
    }
}

/// Refuses text beside a prompt that may be a part of the question.
fn refuse_beside_prompt(row: &Row) -> Result<()> {
    let beside = ["input", "context"].into_iter().find(|key| row.get(key).is_some_and(|value| !is_blank(value)));
    let Some(key) = beside else { return Ok(()) };
    let expected = format!(
        "--columns instruction=prompt, which appends it to the prompt, or --columns unused={key} if it is no part of the \
         question"
    );
    Err(row.error(format!("{} beside `prompt`", row.name(key)), expected))
}

/// Makes the assistant's messages context, which is not trained.
fn forget(messages: &mut [Message]) {
    for message in messages.iter_mut().filter(|message| message.role == "assistant") {
        message.training = Training::Context;
    }
}

/// Messages of the layouts that count only where none of the first four does.
fn other_messages(row: &Row) -> Result<Vec<Message>> {
    let having = |keys: &[&'static str]| -> Vec<&'static str> {
        keys.iter().copied().filter(|key| row.get(key).is_some()).collect()
    };
    let (lists, mut questions, answers) = (having(&TURNS), having(&QUESTIONS), having(&ANSWERS));
    if questions.is_empty() {
        questions = having(&["input"]);
    }
    match (lists.as_slice(), questions.as_slice(), answers.as_slice()) {
        ([list], [], []) => turns(row, list, "role"),
        ([], [question], [answer]) if row.get(question).is_some_and(Value::is_array) => {
            let mut all = side(row, question, "user")?;
            forget(&mut all);
            all.extend(side(row, answer, "assistant")?);
            Ok(all)
        }
        ([], [question], [answer]) => pair(row, question, answer),
        ([], [], _) | ([], _, []) => Err(no_layout(row)),
        _ => Err(several(row)),
    }
}

fn several(row: &Row) -> crate::error::Error {
    let found = format!("keys of more than one layout: {}", row.keys());
    row.error(found, format!("the keys of only one of {LAYOUTS}"))
}

fn no_layout(row: &Row) -> crate::error::Error {
    let known = QUESTIONS.iter().chain(&ANSWERS).chain(&["messages", "conversations"]);
    if let Some(key) = known.into_iter().find(|key| row.fields.get(**key).is_some_and(Value::is_null)) {
        return row.error(format!("{} is null or NaN", row.name(key)), "a text or a list of turns");
    }
    let found = format!("the keys {}", row.keys());
    if let Some((_, remedy)) = OTHER_KINDS.iter().find(|(key, _)| row.get(key).is_some()) {
        return row.error(found, format!("{remedy}. Known are the keys of {LAYOUTS}"));
    }
    let nested = |value: &Value| matches!(value, Value::Array(list) if list.first().is_some_and(Value::is_object));
    if let Some((key, _)) = row.fields.iter().find(|(_, value)| nested(value)) {
        let key = short(key);
        let remedy = format!("--field {key} for rows under it, --columns messages={key} for its turns");
        return row.error(found, format!("{remedy}, or the keys of {LAYOUTS}"));
    }
    row.error(found, format!("the keys of {LAYOUTS}"))
}

/// Question and answer, after the turns of `history`.
fn pair(row: &Row, question: &str, answer: &str) -> Result<Vec<Message>> {
    let mut all = history(row)?;
    let text = row.text(question)?;
    if question == "prompt" {
        refuse_beside_prompt(row)?;
    }
    // What an instruction is about; beside other questions only `input` is a usual name for it.
    let about: &[&str] = match question {
        "instruction" => &["input", "context"],
        "question" | "query" => &["input"],
        _ => &[],
    };
    if question == "question" || question == "query" {
        row.refuse(&["context"], "--columns input=context, which appends it to the question after a blank line")?;
    }
    let about = about.iter().find(|key| row.get(key).is_some_and(|value| !is_blank(value)));
    all.push(Message::new(
        "user",
        match about {
            Some(key) => format!("{text}\n\n{}", row.text(key)?),
            None => text.to_owned(),
        },
    ));
    all.push(Message::new("assistant", row.text(answer)?));
    Ok(all)
}

/// Earlier pairs of question and answer, which are trained too, as in LLaMA-Factory.
fn history(row: &Row) -> Result<Vec<Message>> {
    let Some(value) = row.get("history").filter(|value| !is_blank(value)) else { return Ok(Vec::new()) };
    let wrong = || row.error(format!("{} without pairs", row.name("history")), "a list of [question, answer]");
    let value = parsed(value);
    let mut all = Vec::new();
    for turn in value.as_array().ok_or_else(wrong)? {
        let (Some(question), Some(answer), 2) =
            (turn[0].as_str(), turn[1].as_str(), turn.as_array().map_or(0, Vec::len))
        else {
            return Err(wrong());
        };
        all.extend([Message::new("user", question), Message::new("assistant", answer)]);
    }
    Ok(all)
}

/// `prompt` or `completion` of a row: a string, or a list of messages.
fn side(row: &Row, key: &str, role: &str) -> Result<Vec<Message>> {
    match row.get(key) {
        Some(Value::Array(_)) => turns(row, key, "role"),
        _ => Ok(vec![Message::new(role, row.text(key)?)]),
    }
}

/// Puts the row's own system message before the turns.
fn put_system(row: &Row, messages: &mut Vec<Message>) -> Result<()> {
    let Some(system) = system(row)? else { return Ok(()) };
    match messages.first_mut() {
        Some(first) if first.role == "system" && (first.content == system || first.content.trim().is_empty()) => {
            *first = Message::new("system", system);
        }
        Some(first) if first.role == "system" => {
            return Err(row.error("two system messages, in the row and in its turns", "one of them"));
        }
        _ => messages.insert(0, Message::new("system", system)),
    }
    Ok(())
}

/// The row's own system message.
fn system(row: &Row) -> Result<Option<String>> {
    let mut given = SYSTEM.iter().filter(|key| row.get(key).is_some_and(|value| !is_blank(value)));
    match (given.next(), given.next()) {
        (Some(key), None) => Ok(Some(row.text(key)?.to_owned())),
        (None, _) => Ok(None),
        (Some(one), Some(other)) => Err(row.error(format!("both `{one}` and `{other}`"), "one of them")),
    }
}

/// Declarations of tools: a list of objects, or its JSON text.
fn tools(row: &Row) -> Result<Vec<Value>> {
    let Some(value) = row.get("tools").filter(|value| !is_blank(value)) else { return Ok(Vec::new()) };
    let wrong = |what: &str| row.error(format!("{} is {what}", row.name("tools")), "a list of JSON schemas");
    let Value::Array(list) = parsed(value) else { return Err(wrong(kind(value))) };
    let list: Vec<Value> = list.iter().map(parsed).collect();
    match list.iter().find(|tool| !tool.is_object()) {
        Some(other) => Err(wrong(&format!("a list that holds {}", kind(other)))),
        None => Ok(list),
    }
}

fn checked(row: &Row, mut messages: Vec<Message>) -> Result<Vec<Message>> {
    messages.retain(|m| m.role != "system" || !m.content.trim().is_empty());
    let system = messages.first().is_some_and(|m| m.role == "system");
    let turns = messages.get(usize::from(system)..).unwrap_or_default();
    let order = "an optional system message, then user and assistant in turn (results of tools behind an assistant's \
                 message), ending with the assistant";
    let mut due: &[&str] = &["user"];
    for (i, turn) in turns.iter().enumerate() {
        if !due.contains(&turn.role.as_str()) {
            let due = due.first().unwrap_or(&"user");
            return Err(row.error(format!("turn {} has the role {}, not {due}", i + 1, turn.role), order));
        }
        let may_be_empty = turn.role == "tool" || turn.fields.contains_key("tool_calls");
        if turn.content.trim().is_empty() && !may_be_empty {
            return Err(row.error(format!("turn {} ({}) is empty", i + 1, turn.role), "text in every turn"));
        }
        due = match turn.role.as_str() {
            "user" => &["assistant"],
            "tool" => &["assistant", "tool"],
            _ => &["user", "tool"],
        };
    }
    match turns.last() {
        None => Err(row.error("no turns", order)),
        Some(last) if last.role == "user" => Err(row.error("the last turn is the user's", order)),
        Some(last) if last.role != "assistant" => Err(row.error("the last turn is a tool's", order)),
        Some(_) => Ok(messages),
    }
}
