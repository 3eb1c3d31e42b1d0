//! One run of the bench executable: its command line, and its measurements.

use super::clock::Device;
use super::cublaslt::CublasLt;
use super::ladder::Ladder;
use super::roofline::{self, Measured};
use super::shapes::Scale;
use criterion::Criterion;
use serde_json::json;
use std::rc::Rc;
use std::time::Duration;
use swat::backend::cuda::{Cuda, Precision};
use swat::backend::{Cost, Roofline};

/// What is done with a ladder.
pub enum Mode {
    /// Timed by criterion.
    Criterion(Box<Criterion>),
    /// Sampled, as JSON lines.
    Json(Choice),
    /// Two variants, interleaved.
    Ab([String; 2], Choice),
    /// Called twice, the second time within the range of an external profiler.
    Once(Choice),
    /// Ids are printed.
    List(Choice),
}

/// A choice of ids.
#[derive(Default)]
pub struct Choice {
    /// Ids that contain one of these; empty: all.
    pub parts: Vec<String>,
    /// Variants of these names; empty: all.
    pub variants: Vec<String>,
}

impl Choice {
    /// Whether `variant` of the ladder `id` is chosen.
    pub fn takes(&self, id: &str, variant: &str) -> bool {
        let full = format!("{id}/{variant}");
        (self.parts.is_empty() || self.parts.iter().any(|part| full.contains(part)))
            && (self.variants.is_empty() || self.variants.iter().any(|name| name == variant))
    }

    /// Whether an id of `family` can be chosen: parts may name other families.
    pub fn wants(&self, family: &str, families: &[&str]) -> bool {
        let of_another = |part: &String| {
            let first = part.split('/').next().unwrap_or_default();
            first != family && families.contains(&first)
        };
        self.parts.is_empty() || !self.parts.iter().all(of_another)
    }
}

impl Mode {
    pub(super) fn from_args() -> Self {
        let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
        let (mut how, mut ab, mut choice) = (None, None, Choice::default());
        let names = |text: Option<String>| -> Vec<String> {
            text.unwrap_or_default().split(',').filter(|name| !name.is_empty()).map(String::from).collect()
        };
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--json" | "--once" | "--list" => how = Some(argument),
                "--gpu" => {}
                "--ab" => ab = Some(names(arguments.next())),
                "--variants" => choice.variants = names(arguments.next()),
                _ => choice.parts.push(argument),
            }
        }
        match (how.as_deref(), ab.map(<[String; 2]>::try_from)) {
            (None, Some(Ok(pair))) if choice.variants.is_empty() => Self::Ab(pair, choice),
            (Some("--json"), None) => Self::Json(choice),
            (Some("--once"), None) => Self::Once(choice),
            (Some("--list"), None) => Self::List(choice),
            (None, None) if choice.variants.is_empty() => Self::Criterion(Box::new(criterion())),
            _ => {
                eprintln!(
                    "expected one of --ab A,B, --json, --once and --list; --variants A,… goes with the last three"
                );
                std::process::exit(2);
            }
        }
    }

    fn choice(&self) -> Option<&Choice> {
        match self {
            Self::Criterion(_) => None,
            Self::Json(choice) | Self::Ab(_, choice) | Self::Once(choice) | Self::List(choice) => Some(choice),
        }
    }
}

fn criterion() -> Criterion {
    let criterion = Criterion::default().nresamples(10_000).sample_size(10);
    criterion
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(400))
        .configure_from_args()
}

/// The run of the bench executable.
pub struct Session {
    pub(super) family: &'static str,
    pub(super) mode: Mode,
    /// Sizes of everything.
    pub scale: &'static Scale,
    /// Printed before the first measurement.
    pub(super) note: Option<String>,
    ceilings: Option<(Roofline, &'static str)>,
    /// Whether this family's roofline has been printed.
    told: bool,
    /// Missing peers of this family, and why.
    missing: Vec<(&'static str, String)>,
    /// Number of ladders with a chosen variant.
    pub(super) chosen: usize,
    /// Measurements of this family so far.
    pub measured: Vec<Measured>,
}

impl Session {
    /// A session without measurements.
    pub fn new(family: &'static str, mode: Mode, scale: &'static Scale) -> Self {
        Self {
            family,
            mode,
            scale,
            note: None,
            ceilings: None,
            told: false,
            missing: Vec::new(),
            chosen: 0,
            measured: Vec::new(),
        }
    }

    /// Starts a family; false if none of its ids can be chosen.
    pub(super) fn begin(&mut self, family: &'static str, families: &[&str]) -> bool {
        if self.mode.choice().is_some_and(|choice| !choice.wants(family, families)) {
            return false;
        }
        (self.family, self.told) = (family, false);
        true
    }

    /// A ladder of an operation at a shape; `make` allocates the tensors of a call, once for each rotated buffer.
    pub fn ladder<'a, D: Device, T>(
        &'a mut self,
        device: &'a D,
        op: impl Into<String>,
        shape: impl Into<String>,
        cost: Cost,
        make: impl Fn(&D) -> T + 'a,
    ) -> Ladder<'a, D, T> {
        Ladder::new(self, device, op.into(), shape.into(), cost, Box::new(make))
    }

    /// cuBLASLt, if this scale uses libraries; if it is missing, the reason goes into the report.
    pub fn cublaslt<P: Precision>(&mut self, cuda: &Cuda<P>) -> Option<Rc<CublasLt<P>>> {
        if !self.scale.libraries {
            return None;
        }
        match CublasLt::open(cuda) {
            Ok(library) => Some(library),
            Err(reason) => {
                self.missing.push(("cublaslt", reason));
                None
            }
        }
    }

    /// Prints the note, once.
    pub(super) fn tell(&mut self) {
        if let Some(note) = self.note.take() {
            eprintln!("{note}");
        }
    }

    /// Prints, before a family's first JSON line, the roofline and the missing peers.
    pub(super) fn head<D: Device>(&mut self, device: &D) {
        if std::mem::replace(&mut self.told, true) {
            return;
        }
        let (Roofline { flops_per_s, bytes_per_s }, whose) = self.ceilings(device);
        let (family, product) = (self.family, device.product());
        let ceilings = json!({ "flops_per_s": flops_per_s, "bytes_per_s": bytes_per_s });
        println!("{}", json!({ "family": family, "ceilings": ceilings, "product_by": whose, "device": product }));
        for (peer, reason) in &self.missing {
            println!("{}", json!({ "family": family, "missing": peer, "reason": reason, "device": product }));
        }
    }

    /// Prints this family's table; on stderr if JSON goes to stdout.
    pub(super) fn report<D: Device>(&mut self, device: &D) {
        if !self.measured.is_empty() {
            let (ceilings, whose) = self.ceilings(device);
            let mut text = roofline::table(&self.measured, &device.product(), &ceilings, whose).text();
            for (peer, reason) in &self.missing {
                text += &format!("MISSING PEER {peer}: {reason}\n");
            }
            match self.mode {
                Mode::Json(_) => eprint!("{text}"),
                _ => print!("{text}"),
            }
        }
        self.measured.clear();
        self.missing.clear();
    }

    /// Ends the run.
    ///
    /// # Errors
    /// If nothing was chosen.
    pub(super) fn end(mut self) -> Result<(), String> {
        self.tell();
        match (&self.mode, self.chosen) {
            (Mode::Ab([a, b], _), 0) => Err(format!("no ladder that was chosen has both {a} and {b}")),
            (Mode::Json(choice) | Mode::Once(choice) | Mode::List(choice), 0) => {
                Err(format!("no id holds {:?} with a variant of {:?}", choice.parts, choice.variants))
            }
            _ => Ok(()),
        }
    }

    /// The roofline, measured once.
    pub(super) fn ceilings<D: Device>(&mut self, device: &D) -> (Roofline, &'static str) {
        *self.ceilings.get_or_insert_with(|| device.ceilings(self.scale))
    }
}
