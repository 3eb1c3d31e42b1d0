//! stub until merged
/// stub
pub struct Philox;
impl Philox {
    /// stub
    pub fn new(_s: u64, _t: u64) -> Self {
        todo!()
    }
    /// stub
    pub fn at(_s: u64, _t: u64, _c: u64) -> Self {
        todo!()
    }
    /// stub
    pub fn uniform(&mut self) -> f64 {
        todo!()
    }
}
