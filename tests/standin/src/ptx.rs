//! Translates PTX to C++: each instruction becomes a call of the function of its name in `cpp/ptx.h`.

use std::collections::BTreeMap;
use std::fmt::Write;

/// C++ with the kernels of a PTX file.
///
/// # Errors
/// If a statement is not understood; the message quotes it. The C++ compiler reports instructions that `ptx.h` lacks.
pub fn to_cpp(ptx: &str) -> Result<String, String> {
    let code = ptx.split_once(".section").map_or(ptx, |(code, _debug)| code);
    let (mut text, mut files) = (String::new(), BTreeMap::new());
    for line in code.lines().map(|line| line.split("//").next().unwrap_or_default()) {
        match line.trim() {
            file if file.starts_with(".file") => {
                let mut words = file.split_whitespace().skip(1);
                let path = words.next().zip(words.next()).ok_or(file)?;
                files.insert(
                    path.0.to_string(),
                    path.1.trim_matches('"').rsplit('/').next().unwrap_or_default().to_string(),
                );
            }
            location if location.starts_with(".loc") => writeln!(text, "{location};").expect("a String"),
            _ => writeln!(text, "{line}").expect("a String"),
        }
    }
    let mut file = File { files, sites: String::new(), count: 0, shared: String::new(), kernels: String::new() };
    let mut rest = text.as_str();
    while let Some(start) = rest.find(".entry") {
        shared_of_the_file(&rest[..start], &mut file.shared)?;
        let (head, body) = rest[start + ".entry".len()..].split_once('{').ok_or("an entry without a body")?;
        let end = closing(body).ok_or("a body without an end")?;
        kernel(head, &body[..end], &mut file)?;
        rest = &body[end + 1..];
    }
    let File { sites, shared, kernels, .. } = file;
    Ok(format!(
        "#include \"ptx.h\"\nusing namespace standin::ptx;\nnamespace {{ extern const standin::Site sites[]; }}\n{shared}{kernels}\
         namespace {{ const standin::Site sites[] = {{\n{sites}{{}}}}; }}\n"
    ))
}

/// The parts of the C++ file.
struct File {
    /// Names of source files, by number.
    files: BTreeMap<String, String>,
    sites: String,
    count: usize,
    shared: String,
    kernels: String,
}

/// Offset of the brace that closes one opened before the text.
fn closing(text: &str) -> Option<usize> {
    let mut depth = 1;
    text.find(|c| {
        depth += i32::from(c == '{') - i32::from(c == '}');
        depth == 0
    })
}

/// Module-level variables.
fn shared_of_the_file(text: &str, out: &mut String) -> Result<(), String> {
    for statement in text.split(';').map(str::trim) {
        let words: Vec<&str> = statement.split_whitespace().collect();
        // Exported constants, which only the host reads.
        let constant = matches!(words[..], [.., ".global", ".align", "4", ".u32", _, "=", _]);
        if words.contains(&".shared") && !words.contains(&".extern") {
            shared_variable(&words, out)?;
        } else if constant {
            continue;
        } else if words.contains(&".global") || words.contains(&".const") || words.contains(&".func") {
            return Err(statement.into());
        }
    }
    Ok(())
}

/// `.shared .align 4 .b8 name[128]`
fn shared_variable(words: &[&str], out: &mut String) -> Result<(), String> {
    let at = words.iter().position(|w| *w == ".align").and_then(|at| words.get(at + 1..at + 4));
    let Some([align, kind, name]) = at else { return Err(words.join(" ")) };
    let (name, count) = name.split_once('[').map_or((*name, "1"), |(name, count)| (name, count.trim_end_matches(']')));
    let bytes = size_of(&kind[1..])?;
    writeln!(out, "alignas({align}) static thread_local unsigned char {name}[{bytes} * {count}];").expect("a String");
    Ok(())
}

fn size_of(kind: &str) -> Result<u32, String> {
    let bits = kind.trim_start_matches(|c: char| !c.is_ascii_digit()).parse::<u32>();
    bits.map(|bits| bits / 8).map_err(|_| format!("the type {kind}"))
}

/// A kernel being translated.
struct Kernel<'a> {
    name: &'a str,
    /// Offset of each parameter.
    parameters: BTreeMap<String, u32>,
    file: &'a mut File,
    /// Current source file and line.
    at: (String, String),
    text: String,
    /// The last access since a label or a barrier: kind, base register, and its range of offsets.
    last: Option<(String, i64, i64)>,
}

fn kernel(head: &str, body: &str, file: &mut File) -> Result<(), String> {
    let (name, rest) = head.split_once('(').ok_or_else(|| head.to_string())?;
    let (list, _) = rest.split_once(')').ok_or_else(|| head.to_string())?;
    let name = name.trim();
    let (mut parameters, mut layout, mut end) = (BTreeMap::new(), String::new(), 0_u32);
    for parameter in list.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let words: Vec<&str> = parameter.split_whitespace().collect();
        let (align, kind, parameter) = match words[..] {
            [".param", ".align", align, kind, name] => (align.parse().ok(), kind, name),
            [".param", kind, name] => (None, kind, name),
            _ => return Err(parameter.into()),
        };
        let size = size_of(&kind[1..])?;
        let (parameter, count) = match parameter.split_once('[') {
            Some((name, count)) => (name, count.trim_end_matches(']').parse().map_err(|_| parameter.to_string())?),
            None => (parameter, 1),
        };
        let at = end.next_multiple_of(align.unwrap_or(size));
        end = at + size * count;
        write!(layout, "{{{at}, {}}}, ", size * count).expect("a String");
        parameters.insert(parameter.into(), at);
    }
    let mut kernel =
        Kernel { name, parameters, file, at: (String::new(), "0".into()), text: String::new(), last: None };
    kernel.statements(body)?;
    let text = kernel.text;
    write!(
        file.kernels,
        "static const standin::Parameter {name}_layout[] = {{{layout}{{{end}, 0}}}};\n\
         static void {name}(const unsigned char* arguments) {{\n  (void)arguments;\n{text}}}\n\
         static Export {name}_export(\"{name}\", __BASE_FILE__, {name}_layout, {name});\n\n"
    )
    .expect("a String");
    Ok(())
}

/// No name of `ptx.h` begins with `$`, except those of special registers.
fn register(name: &str) -> String {
    name.replace('%', "$").replace('.', "_")
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_alphanumeric() || "_$".contains(c))
}

/// Operands, separated by commas that are not within brackets.
fn split(text: &str) -> Vec<&str> {
    let (mut parts, mut depth, mut start) = (Vec::new(), 0, 0);
    for (at, c) in text.char_indices() {
        match c {
            '{' | '[' => depth += 1,
            '}' | ']' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(text[start..at].trim());
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(text[start..].trim());
    parts.retain(|part| !part.is_empty());
    parts
}

impl Kernel<'_> {
    /// Statements, labels and blocks.
    fn statements(&mut self, body: &str) -> Result<(), String> {
        let (mut statement, mut vector) = (String::new(), false);
        for c in body.chars() {
            match c {
                '{' if statement.trim().is_empty() => {
                    statement.clear();
                    self.text.push_str("{\n");
                }
                '}' if !vector => {
                    if !statement.trim().is_empty() {
                        return Err(format!("{statement:?} without an end"));
                    }
                    self.text.push_str("}\n");
                }
                ':' if !vector && is_name(statement.trim()) => {
                    writeln!(self.text, "{}:;", statement.trim()).expect("a String");
                    self.last = None;
                    statement.clear();
                }
                ';' => {
                    self.statement(statement.trim())?;
                    statement.clear();
                }
                _ => {
                    vector = c == '{' || (vector && c != '}');
                    statement.push(c);
                }
            }
        }
        Ok(())
    }

    fn statement(&mut self, statement: &str) -> Result<(), String> {
        let fail = || statement.to_string();
        let words: Vec<&str> = statement.split_whitespace().collect();
        match words[..] {
            [] | [".pragma", ..] => return Ok(()),
            [".loc", file, line, ..] => {
                let name = |file: &str| self.file.files.get(file).cloned().unwrap_or_default();
                // For code of the shared headers, the place that it is inlined at.
                let inlined = words.iter().position(|w| *w == "inlined_at").and_then(|i| words.get(i + 1..i + 3));
                let header = |name: &str| name.starts_with("prelude") || name.starts_with("cuda_");
                self.at = match (name(file), inlined) {
                    (own, Some([file, line])) if header(&own) => (name(file), line.to_string()),
                    (own, _) => (own, line.into()),
                };
                return Ok(());
            }
            [".reg", kind, list] => {
                // `%r<9>` declares %r0 to %r8.
                let many =
                    list.split_once('<').and_then(|(name, n)| Some((name, n.strip_suffix('>')?.parse::<u32>().ok()?)));
                let list: Vec<String> = match many {
                    Some((name, count)) => (0..count).map(|i| format!("{}{i}", register(name))).collect(),
                    None => vec![register(list)],
                };
                let kind = match &kind[1..] {
                    "pred" => "bool".to_string(),
                    other => format!("u{}", 8 * size_of(other)?),
                };
                writeln!(self.text, "[[maybe_unused]] {kind} {};", list.join(", ")).expect("a String");
                return Ok(());
            }
            [".shared", ..] => return shared_variable(&words, &mut self.file.shared),
            [".local", ".align", align, ".b8", name] => {
                writeln!(self.text, "alignas({align}) unsigned char {name};").expect("a String");
                return Ok(());
            }
            _ if statement.starts_with('.') => return Err(fail()),
            _ => {}
        }
        let (guard, instruction) = match statement.strip_prefix('@') {
            Some(guarded) => guarded.split_once(char::is_whitespace).ok_or_else(fail)?,
            None => ("", statement),
        };
        let instruction = instruction.trim();
        let (code, operands) = instruction.split_once(char::is_whitespace).unwrap_or((instruction, ""));
        if ["bra", "bar"].iter().any(|c| code.starts_with(c)) {
            self.last = None;
        }
        let call = self.call(code, &split(operands)).ok_or_else(fail)?;
        if !guard.is_empty() {
            let (not, predicate) = guard.strip_prefix('!').map_or(("", guard), |p| ("!", p));
            write!(self.text, "if ({not}{}) ", register(predicate)).expect("a String");
        }
        writeln!(self.text, "{call};").expect("a String");
        Ok(())
    }

    /// Index of an access site: `bytes` at an offset from `base`. ptxas merges consecutive accesses to neighbours if it
    /// can prove their alignment; in these kernels it does so for pairs of f32, not for 16 bytes split into four words.
    /// Pairs are counted as one.
    fn site(&mut self, [shared, writes]: [bool; 2], base: String, offset: i64, bytes: i64) -> String {
        let start = self.last.take().and_then(|(before, start, end)| {
            (before == base && end == offset && offset + bytes - start <= 8).then_some(start)
        });
        self.last = Some((base, start.unwrap_or(offset), offset + bytes));
        let (source, line) = &self.at;
        let joined = start.is_some();
        writeln!(
            self.file.sites,
            "{{\"{}\", \"{source}\", {line}, {bytes}, {shared}, {writes}, {joined}}},",
            self.name
        )
        .expect("a String");
        self.file.count += 1;
        format!("sites[{}]", self.file.count - 1)
    }

    /// The C++ of an instruction; `None` if its form is unknown.
    fn call(&mut self, code: &str, operands: &[&str]) -> Option<String> {
        let parts: Vec<&str> = code.split('.').collect();
        let all = |k: &Self| operands.iter().map(|o| k.operand(o)).collect::<Option<Vec<_>>>();
        Some(match parts[..] {
            ["bra", ..] => format!("goto {}", operands.first()?),
            ["ret"] => "return".into(),
            ["ld", ref how @ .., kind] => {
                let [to, from] = operands[..] else { return None };
                format!("load<{kind}>({}, {})", self.place(false, how, kind, from, to)?, self.operand(to)?)
            }
            ["st", ref how @ .., kind] => {
                let [to, from] = operands[..] else { return None };
                format!("store<{kind}>({}, {})", self.place(true, how, kind, to, from)?, self.operand(from)?)
            }
            ["mov", kind] => {
                let [to, from] = operands[..] else { return None };
                let (function, kind) = match (to.starts_with('{'), from.starts_with('{')) {
                    (true, _) => ("unpack", String::new()),
                    (_, true) => ("pack", String::new()),
                    _ => ("mov", format!("<{kind}>")),
                };
                format!("{function}{kind}({}, {})", self.operand(to)?, self.operand(from)?)
            }
            ["setp", compare, kind] => {
                let [to, a, b] = &all(self)?[..] else { return None };
                format!("{to} = {compare}<{kind}>({a}, {b})")
            }
            ["cvt", "f32", "bf16"] => format!("cvt_bf16<bf16>({})", all(self)?.join(", ")),
            ["cvt", ref how @ .., to, from] => {
                let name: String = how.iter().filter(|h| **h != "ftz").map(|h| format!("_{h}")).collect();
                format!("cvt{name}<{to}, {from}>({})", all(self)?.join(", "))
            }
            ["ldmatrix", "sync", "aligned", "m8n8", _, ref how @ .., "b16"] => {
                let [to, row] = operands[..] else { return None };
                let (site, row, to) =
                    (self.site([true, false], String::new(), 0, 16), self.operand(row)?, self.operand(to)?);
                format!("ldmatrix({site}, {}, {row}, {to})", how.contains(&"trans"))
            }
            ["stmatrix", "sync", "aligned", "m8n8", "x4", "shared", "b16"] => {
                format!("stmatrix({}, {})", self.site([true, true], String::new(), 0, 16), all(self)?.join(", "))
            }
            ["mma", "sync", "aligned", shape, "row", "col", "f32", "bf16", "bf16", "f32"] => {
                format!("mma_{shape}({})", all(self)?.join(", "))
            }
            ["wgmma", "mma_async", "sync", "aligned", _, "f32", "bf16", "bf16"] => {
                let all = all(self)?;
                let (sums, rest) = all.split_first()?;
                // With A in registers there is no major-ness of A to choose.
                let name = if operands.get(1)?.starts_with('{') { "wgmma_registers" } else { "wgmma" };
                format!("{name}({}, {sums})", rest.join(", "))
            }
            ["cp", "async", "cg", "shared", "global"] => {
                format!(
                    "cp_async_cg_shared_global({}, {})",
                    self.site([false, true], String::new(), 0, 16),
                    all(self)?.join(", ")
                )
            }
            ["bar" | "cp" | "mbarrier" | "fence" | "membar" | "nanosleep" | "setmaxnreg" | "wgmma", ..] => {
                format!("{}({})", code.replace(['.', ':'], "_").replace("__", "_"), all(self)?.join(", "))
            }
            ["cvta", ref how @ .., "u64"] => format!("cvta_{}({})", how.join("_"), all(self)?.join(", ")),
            [name @ ("and" | "or" | "xor" | "not"), kind] => format!("{name}_<{kind}>({})", all(self)?.join(", ")),
            [ref name @ .., kind] if !name.is_empty() => {
                format!("{}<{kind}>({})", name.join("_"), all(self)?.join(", "))
            }
            _ => return None,
        })
    }

    /// A memory operand of `ld` and `st`, as a checked pointer.
    fn place(&mut self, to_memory: bool, how: &[&str], kind: &str, address: &str, registers: &str) -> Option<String> {
        let count = if registers.starts_with('{') { split(registers.trim_matches(['{', '}'])).len() } else { 1 };
        let wide = how.iter().find_map(|h| h.strip_prefix('v')?.parse::<usize>().ok()).unwrap_or(1);
        let inner = address.trim_matches(['[', ']']);
        let (base, offset) = inner.split_once('+').unwrap_or((inner, "0"));
        let (base, offset) = (format!("{to_memory} {base}"), offset.parse().unwrap_or(0));
        let bytes = i64::from(size_of(kind).ok()?) * count as i64;
        let address = self.operand(address)?;
        Some(match how.iter().find(|h| ["param", "shared", "global", "local", "const"].contains(*h)) {
            _ if wide != count => return None,
            Some(&"param") => format!("arguments + {address}"),
            Some(&"shared") => {
                format!(
                    "in_shared<{kind}>({}, (u32)({address}), {count})",
                    self.site([true, to_memory], base, offset, bytes)
                )
            }
            Some(&"global") | None => {
                format!("in_global<{kind}>({}, {address}, {count})", self.site([false, to_memory], base, offset, bytes))
            }
            Some(&"local") => format!("in_local({address})"),
            Some(_) => return None,
        })
    }

    /// A register, constant, symbol, address, or vector of these, as C++ arguments.
    fn operand(&self, text: &str) -> Option<String> {
        let inner = |open, close| text.strip_prefix(open).and_then(|t| t.strip_suffix(close));
        if let Some(list) = inner('{', '}').or_else(|| inner('[', ']').filter(|list| list.contains(','))) {
            return Some(split(list).iter().map(|part| self.operand(part)).collect::<Option<Vec<_>>>()?.join(", "));
        }
        if let Some(address) = inner('[', ']') {
            let (base, offset) = address.split_once('+').unwrap_or((address, "0"));
            // A parameter is addressed from the start of the arguments.
            let base = self.parameters.get(base).map(u32::to_string).or_else(|| self.operand(base))?;
            return Some(if offset == "0" { base } else { format!("{base} + ({offset})") });
        }
        if let Some((a, b)) = text.split_once('|') {
            return Some(format!("{}, {}", self.operand(a)?, self.operand(b)?));
        }
        if let Some(bits) = text.strip_prefix("0f") {
            return Some(format!("0x{bits}u"));
        }
        if let Some(bits) = text.strip_prefix("0d") {
            return Some(format!("0x{bits}ull"));
        }
        if text.starts_with('%') {
            return Some(register(text));
        }
        if let Some(offset) = self.parameters.get(text) {
            return Some(format!("reinterpret_cast<u64>(arguments + {offset})"));
        }
        Some(match text {
            "_" => "0".into(),
            "dynamic_shared" => "shared_address(standin::block->dynamic)".into(),
            _ if text.starts_with("__local_depot") => format!("reinterpret_cast<u64>({text})"),
            _ if text.starts_with("_Z") => format!("shared_address({text})"),
            _ => text.into(),
        })
    }
}
