//! Reads cubins: ELF files in which a section `.nv.info.<kernel>` describes each kernel.

use std::collections::BTreeMap;
use std::path::PathBuf;

/// Attributes of `.nv.info`.
const MAX_THREADS: u8 = 0x05;
const PARAMETER: u8 = 0x17;
const REGISTERS: u8 = 0x2f;

/// A compiled kernel.
#[derive(Debug, Default)]
pub struct Kernel {
    /// Offset and bytes of each parameter.
    pub parameters: BTreeMap<u16, (u32, u32)>,
    /// Maximum threads of a block by `__launch_bounds__`, if it has them.
    launch_bounds: Option<usize>,
    /// Registers of a thread.
    pub registers: usize,
    /// Static shared memory; from compute capability 9.0 on including the KiB that the driver reserves for each block.
    pub static_bytes: usize,
}

impl Kernel {
    /// Maximum threads of a block: by `__launch_bounds__`, else by the registers of a multiprocessor, which are allocated
    /// by 256 a warp, warps by four.
    pub fn threads(&self) -> usize {
        let warps = (1 << 16) / (32 * self.registers.max(1)).next_multiple_of(256) / 4 * 4;
        self.launch_bounds.unwrap_or((32 * warps).min(1024))
    }
}

/// The code of a kernel file for one architecture.
#[derive(Debug, Default)]
pub struct Cubin {
    /// 80 for compute capability 8.0.
    pub architecture: usize,
    /// By symbol.
    pub kernels: BTreeMap<String, Kernel>,
    /// Initialized `__device__ uint32_t`, by name.
    pub constants: BTreeMap<String, u32>,
}

struct Section {
    name: String,
    start: usize,
    size: usize,
}

/// A little-endian number.
fn number(bytes: &[u8], at: usize, size: usize) -> usize {
    bytes[at..at + size].iter().rev().fold(0, |n, byte| n << 8 | usize::from(*byte))
}

fn text(bytes: &[u8], at: usize) -> String {
    let bytes = bytes[at..].iter().copied().take_while(|byte| *byte != 0).collect();
    String::from_utf8(bytes).expect("ASCII")
}

fn sections(cubin: &[u8]) -> Vec<Section> {
    let (table, entry) = (number(cubin, 0x28, 8), number(cubin, 0x3a, 2));
    let (count, names) = (number(cubin, 0x3c, 2), number(cubin, 0x3e, 2));
    let place = |header: usize| (number(cubin, header + 0x18, 8), number(cubin, header + 0x20, 8));
    let names = place(table + names * entry).0;
    let section = |header: usize| {
        let (start, size) = place(header);
        Section { name: text(cubin, names + number(cubin, header, 4)), start, size }
    };
    (0..count).map(|i| section(table + i * entry)).collect()
}

/// The attributes of a `.nv.info` section: code and bytes.
fn attributes<'a>(cubin: &'a [u8], section: &Section) -> Vec<(u8, &'a [u8])> {
    let (mut at, end) = (section.start, section.start + section.size);
    let mut all = Vec::new();
    while at < end {
        // Format, attribute, and a value or (format 4) the bytes of one that follows.
        let (format, attribute, value) = (cubin[at], cubin[at + 1], number(cubin, at + 2, 2));
        at += 4;
        let size = if format == 4 { value } else { 0 };
        all.push((attribute, &cubin[at..at + size]));
        at += size;
    }
    all
}

/// Parses a cubin.
///
/// # Panics
/// If the bytes are not a cubin.
pub fn read(cubin: &[u8]) -> Cubin {
    assert_eq!(cubin[..5], *b"\x7fELF\x02");
    let sections = sections(cubin);
    let find = |name: &str| sections.iter().find(|section| section.name == name);
    let (symbols, names) = (find(".symtab").expect("symbols"), find(".strtab").expect("names").start);
    let symbol = |i: usize| {
        let at = symbols.start + i * 24;
        (text(cubin, names + number(cubin, at, 4)), number(cubin, at + 6, 2), number(cubin, at + 8, 8))
    };
    let mut result = Cubin { architecture: number(cubin, 0x31, 1), ..Cubin::default() };
    for section in &sections {
        let Some(kernel) = section.name.strip_prefix(".nv.info.") else { continue };
        let kernel: &mut Kernel = result.kernels.entry(kernel.into()).or_default();
        for (attribute, bytes) in attributes(cubin, section) {
            match attribute {
                PARAMETER => {
                    let (ordinal, offset) = (number(bytes, 4, 2) as u16, number(bytes, 6, 2) as u32);
                    kernel.parameters.insert(ordinal, (offset, number(bytes, 8, 4) as u32 >> 18));
                }
                MAX_THREADS => kernel.launch_bounds = Some((0..3).map(|i| number(bytes, 4 * i, 4)).product()),
                _ => {}
            }
        }
    }
    for (attribute, bytes) in find(".nv.info").map(|info| attributes(cubin, info)).unwrap_or_default() {
        if let (REGISTERS, Some(kernel)) = (attribute, result.kernels.get_mut(&symbol(number(bytes, 0, 4)).0)) {
            kernel.registers = number(bytes, 4, 4);
        }
    }
    for section in &sections {
        let kernel = section.name.strip_prefix(".nv.shared.").and_then(|name| result.kernels.get_mut(name));
        if let Some(kernel) = kernel {
            kernel.static_bytes = section.size;
        }
    }
    let initial = sections.iter().position(|section| section.name == ".nv.global.init");
    for (name, section, value) in (0..symbols.size / 24).map(symbol) {
        if Some(section) == initial && !name.is_empty() && !name.starts_with('.') {
            result.constants.insert(name, number(cubin, sections[section].start + value, 4) as u32);
        }
    }
    result
}

/// What the kernels of cubins take of a multiprocessor, as the emulated driver reads it: a line for each kernel, with
/// its architecture, name, registers, static shared bytes and maximum number of threads.
///
/// # Panics
/// If a cubin cannot be read.
pub fn resources(cubins: &[PathBuf]) -> String {
    let mut lines = String::new();
    for path in cubins {
        let Cubin { architecture, kernels, .. } = read(&std::fs::read(path).expect("a readable cubin"));
        for (name, Kernel { registers, static_bytes, launch_bounds, .. }) in kernels {
            let threads = launch_bounds.unwrap_or(1024);
            lines += &format!("{architecture} {name} {registers} {static_bytes} {threads}\n");
        }
    }
    lines
}
