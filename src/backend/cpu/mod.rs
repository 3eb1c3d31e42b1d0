//! f32 on the host's cores.
